"""Adapters in our layers, whose kernels read weights in more ways than one."""

import copy

import pytest
import torch

from ldm.diffusion.conditioning import Condition
from ldm.models.compilation import compile_network
from ldm.models.lora import add_lora_layers, select_lora_targets
from ldm.models.unet import UNet
from ldm.utils.lora_weights import merge_adapters

SIZES = {"in_channels": 4, "out_channels": 4, "context_dim": 12, "channels": 16, "groups": 8}
SIZES |= {"multipliers": (1, 2), "attention": (False, True), "blocks": 1, "heads": 2}
RANK, ALPHA = 3, 6.0
FACTS = {"lora": {"rank": RANK, "alpha": ALPHA}}


def randomize(network: torch.nn.Module, seed: int = 0) -> None:
    """Random weights everywhere: those of the last layers and of B are zero at first."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            spread = weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.1
            weight.copy_(torch.randn(weight.shape, generator=generator) * spread)


def make_networks(targets, **changes) -> tuple[UNet, UNet, UNet]:
    """A network, the same with adapters that do something, and one with these in its weights."""
    base = UNet(**(SIZES | changes)).double()
    randomize(base)
    adapted = copy.deepcopy(base)
    add_lora_layers(adapted, rank=RANK, alpha=ALPHA, targets=targets)
    before = call(base)
    torch.testing.assert_close(call(adapted), before, rtol=0, atol=1e-12)  # nothing is trained yet
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    merged = UNet(**(SIZES | changes)).double()
    merged.load_state_dict(merge_adapters(adapted.state_dict(), FACTS))
    return base, adapted.double(), merged


@torch.no_grad()
def call(network: UNet, *, projected: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    draw = {"generator": generator, "dtype": torch.float64}
    x, tokens = torch.randn(2, 4, 8, 8, **draw), torch.randn(2, 5, 12, **draw)
    keys = network.project_text(tokens) if projected else None
    return network(x, torch.tensor([10.0, 900.0]), Condition(tokens, projected=keys))


@pytest.mark.parametrize("targets", ["attention", "all", ["to_k"], ["mid.*.proj_in", "ff.*"]])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_network_with_adapters_is_the_one_with_them_in_its_weights(targets, layout):
    base, adapted, merged = make_networks(targets)
    for network in (base, adapted, merged):
        network.to(memory_format=layout)
    expected = call(merged)
    assert (expected - call(base)).abs().max() > 1e-4, "they change what it paints"
    torch.testing.assert_close(call(adapted), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(call(adapted, projected=True), expected, rtol=1e-6, atol=1e-6)


def test_adapters_alone_are_trained_with_and_without_checkpointing():
    gradients = []
    for levels in ((), "all"):
        torch.manual_seed(0)
        _, adapted, _ = make_networks("all", checkpointing=levels)
        x, tokens = torch.ones(1, 4, 8, 8).double(), torch.ones(1, 3, 12).double()
        adapted(x, torch.tensor(500.0), Condition(tokens)).square().mean().backward()
        trained = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
        assert all("lora_" in name for name in trained)
        assert all(grad is not None for grad in trained.values())
        gradients.append(trained)
    torch.testing.assert_close(*gradients)


@pytest.mark.slow  # the compiler
def test_a_network_with_adapters_compiles_to_one_graph():
    _, adapted, merged = make_networks(["mid.*"])
    expected = call(merged)
    compile_network(adapted, "default", backend="eager", report=lambda line: None)
    torch.testing.assert_close(call(adapted), expected, rtol=1e-6, atol=1e-6)


def test_targets_are_layers_of_the_network():
    network = UNet(**SIZES)
    attention = select_lora_targets(network, "attention")
    assert {name.rpartition(".")[2] for name in attention} == {"to_q", "to_k", "to_v", "to_out"}
    every = select_lora_targets(network, "all")
    assert set(attention) < set(every)
    assert "down.0.blocks.0.conv1" in every
    assert not any(name.startswith(("conv_in", "conv_out", "time_mlp")) for name in every)
    assert select_lora_targets(network, "cross_attn.to_q") == [
        name for name in attention if name.endswith("cross_attn.to_q")
    ]
    with pytest.raises(ValueError, match=r"no layer is called 'to_p'.*to_q, to_v"):
        select_lora_targets(network, ["to_q", "to_p"])


def test_adapters_of_a_damaged_checkpoint_are_refused():
    state = make_networks("attention")[1].state_dict()
    with pytest.raises(ValueError, match="alpha and rank"):
        merge_adapters(state, {})
    name = next(name for name in state if "lora_B" in name)
    with pytest.raises(ValueError, match="is not whole"):
        merge_adapters({n: t for n, t in state.items() if n != name}, FACTS)
    with pytest.raises(ValueError, match="rank 3 down and 2 up"):
        merge_adapters(state | {name: state[name][:, :2]}, FACTS)
