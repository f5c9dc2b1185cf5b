"""The running average against its definition."""

import torch
from torch import nn

from ldm.training.ema import EMA, TensorPair


class Net(nn.Module):
    """Weights, a buffer, and something that behaves differently in training."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2, generator=torch.Generator().manual_seed(0)))
        self.bias = nn.Parameter(torch.zeros(3))
        self.register_buffer("count", torch.tensor(0))
        self.dropout = nn.Dropout(0.5)


def steps(net: Net, count: int):
    """The net's weights after each of so many steps, in double precision."""
    generator = torch.Generator().manual_seed(1)
    for step in range(1, count + 1):
        with torch.no_grad():
            net.weight += torch.randn(3, 2, generator=generator)
        net.count.fill_(step)
        yield step, net.weight.detach().double().clone()


def test_the_average_is_the_closed_form():
    """Once warm: d^n w_0 + (1 - d) sum over i of d^(n - i) w_i."""
    net, decay, n = Net(), 0.9, 50
    ema = EMA(net, decay=decay)
    expected = decay**n * net.weight.detach().double()
    for step, weight in steps(net, n):
        ema.update(net, step=1000 + step)
        expected += (1 - decay) * decay ** (n - step) * weight
    torch.testing.assert_close(ema.module.weight.double(), expected, rtol=1e-6, atol=1e-6)
    assert ema.module.count == n


def test_the_decay_warms_up():
    net = Net()
    ema = EMA(net, decay=0.5)
    average = net.weight.detach().double().clone()
    decays = []
    for step, weight in steps(net, 12):
        ema.update(net, step=step)
        decays.append(min(0.5, (1 + step) / (10 + step)))
        average = decays[-1] * average + (1 - decays[-1]) * weight
        torch.testing.assert_close(ema.module.weight.double(), average, rtol=1e-6, atol=1e-6)
    assert decays[0] == 2 / 11
    assert decays[7] == decays[-1] == 0.5


def test_no_decay_is_a_copy():
    net = Net()
    ema = EMA(net, decay=0)
    for step, weight in steps(net, 3):
        ema.update(net, step=step)
        torch.testing.assert_close(ema.module.weight.double(), weight, rtol=0, atol=0)


def test_the_average_is_neither_in_training_nor_trained():
    whole = nn.ModuleDict({"net": Net(), "ema": EMA(Net(), decay=0.9)})
    whole.train()
    assert whole["net"].dropout.training
    assert not any(module.training for module in whole["ema"].modules())
    assert not any(parameter.requires_grad for parameter in whole["ema"].parameters())
    assert all(parameter.requires_grad for parameter in whole["net"].parameters())


def test_the_average_is_apart_from_the_net():
    net = Net()
    ema = EMA(net, decay=0.9)
    before = ema.module.weight.clone()
    next(steps(net, 1))
    assert torch.equal(ema.module.weight, before)


def test_a_state_dict_goes_round():
    net = Net()
    ema = EMA(net, decay=0.9)
    for step, _ in steps(net, 3):
        ema.update(net, step=step)
    other = EMA(Net(), decay=0.9)
    other.load_state_dict(ema.state_dict())
    assert ema.state_dict().keys() == {f"module.{name}" for name in net.state_dict()}
    for average in (ema, other):
        average.update(net, step=4)
    assert torch.equal(ema.module.weight, other.module.weight)


def test_the_tensors_of_a_pair_are_those_of_the_networks():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)  # each is there twice
    one, other = nn.Sequential(Net(), a, a), nn.Sequential(Net(), b, b)
    pair = TensorPair(one, other)
    one[0].weight = nn.Parameter(torch.ones(3, 2))  # as FSDP replaces weights
    for net, tensors in zip((one, other), pair.parameters(), strict=True):
        assert [id(t) for t in tensors] == [id(t) for t in net.parameters()]
    other[0].count.fill_(7)
    pair.copy_buffers()
    assert one[0].count == 7


def test_frozen_weights_are_in_memory_once_and_stay():
    net = Net()
    net.bias.requires_grad_(False)
    ema = EMA(net, decay=0)
    assert ema.module.bias is net.bias
    before = net.bias.clone()
    for step, weight in steps(net, 2):
        ema.update(net, step=step)
        torch.testing.assert_close(ema.module.weight.double(), weight, rtol=0, atol=0)
    assert torch.equal(net.bias, before)
    assert [len(tensors) for tensors in ema.pair.parameters()] == [1, 1]
