"""A compiled denoiser: one graph for all batches, the same numbers, the same files."""

from copy import deepcopy

import pytest
import torch
from torch._dynamo.utils import counters

from ldm.diffusion.conditioning import Condition
from ldm.models.compilation import compile_network
from ldm.models.unet import UNet
from ldm.training.ema import EMA
from ldm.training.step_clock import count_forward_flops
from ldm.utils.errors import UsageError


@pytest.fixture(autouse=True)
def _empty_cache():
    torch._dynamo.reset()
    counters.clear()


def make_unet(multipliers=(1,), **more):
    torch.manual_seed(0)
    sizes = {"channels": 8, "multipliers": multipliers, "attention": [False] * len(multipliers)}
    how = {"blocks": 1, "heads": 2, "groups": 4, "scale_shift": True, "positional_waves": 2}
    net = UNet(in_channels=4, out_channels=4, context_dim=6, pooled_dim=5, **sizes, **how, **more)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


def make_batch(n):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, 8, 8, generator=generator)
    cond = Condition(
        tokens=torch.randn(n, 7, 6, generator=generator),
        mask=torch.arange(7).expand(n, 7) < 5,
        pooled=torch.randn(n, 5, generator=generator),
    )
    return x, torch.rand(n, generator=generator) * 999, cond


def count_graphs():
    return counters["stats"]["unique_graphs"]


def test_one_graph_serves_all_batch_sizes():
    net, lines = make_unet((1, 2)), []
    plain = deepcopy(net)
    compile_network(net, "default", backend="eager", report=lines.append)
    for n in (4, 3, 6, 2):
        out = net(*make_batch(n))
        torch.testing.assert_close(out, plain(*make_batch(n)))
        out.square().mean().backward()
    assert count_graphs() == 1
    assert len(lines) == 2
    assert lines[0].startswith("compile=default: the first step compiles UNet")
    assert lines[1].startswith("compile=default: the first step of UNet took ")


@pytest.mark.slow
def test_two_graphs_serve_all_sizes_of_images():
    """The second size makes height and width variable."""
    net = make_unet((1, 2)).eval()
    plain = deepcopy(net)
    compile_network(net, "default", backend="eager", report=lambda line: None)
    _, t, cond = make_batch(3)
    with torch.no_grad():
        for height, width in ((8, 8), (6, 10), (10, 6), (8, 12), (4, 16), (16, 4)):
            x = torch.randn(3, 4, height, width)
            torch.testing.assert_close(net(x, t, cond), plain(x, t, cond))
    assert count_graphs() == 2


def test_reduce_overhead_has_a_graph_for_each_size_and_an_output_of_its_own():
    net = make_unet().eval()
    compile_network(net, "reduce-overhead", backend="eager", report=lambda line: None)
    with torch.no_grad():
        for n in (4, 3, 4, 3):
            net(*make_batch(n))
    assert count_graphs() == 2


def test_state_dict_and_copies_are_those_of_the_plain_network():
    net, other = make_unet(), make_unet()
    names = list(net.state_dict())
    compile_network(net, "default", backend="eager", report=lambda line: None)
    net(*make_batch(2))
    assert list(net.state_dict()) == names
    for copy in (deepcopy(net), EMA(net, decay=0.9).module):
        with torch.no_grad():
            copy.conv_out.bias.fill_(7)
            assert copy(*make_batch(2)).mean() > 5  # of its own weights
    with torch.no_grad():
        other.conv_out.bias.fill_(7)
    net.load_state_dict(other.state_dict())
    torch.testing.assert_close(net(*make_batch(2)), other(*make_batch(2)))
    assert count_graphs() == 1


def test_flops_are_counted_without_the_compiler():
    net = make_unet()
    plain = count_forward_flops(net, *make_batch(2))
    compile_network(net, "default", backend="eager", report=lambda line: None)
    assert count_forward_flops(net, *make_batch(2)) == plain > 0
    assert count_graphs() == 0


def test_errors_are_those_of_the_network_or_one_line():
    net = make_unet()
    compile_network(net, "default", backend="eager", report=lambda line: None)
    x, t, cond = make_batch(2)
    with pytest.raises(ValueError, match="the network takes 4 channels, got 3"):
        net(x[:, :3], t, cond)

    class Printer(torch.nn.Linear):
        def forward(self, x, t, cond):
            torch._dynamo.graph_break()
            return x

    printer = Printer(1, 1)
    compile_network(printer, "default", backend="eager", report=lambda line: None)
    with pytest.raises(
        UsageError, match=r"torch cannot compile Printer .*: give compile=off"
    ) as info:
        printer(*make_batch(2))
    assert "\n" not in str(info.value)


def test_more_kinds_of_input_than_torch_compiles_go_on_without():
    net, lines = make_unet().eval(), []
    compile_network(net, "reduce-overhead", backend="eager", report=lines.append)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
        for n in (2, 3, 4, 5):
            assert len(net(*make_batch(n))) == n
    assert (
        lines[-1] == "compile=reduce-overhead: the inputs have too many shapes: it goes on without"
    )
    assert count_graphs() == 2


def test_dropout_in_training_is_refused_and_in_sampling_is_not():
    net = make_unet(dropout=0.1)
    with pytest.raises(UsageError, match=r"model.dropout=0 or compile=off"):
        compile_network(net, "default", backend="eager")
    compile_network(net.eval(), "default", backend="eager", report=lambda line: None)
    net(*make_batch(2))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_compiled_numbers_are_those_of_the_plain_network(dtype):
    """float32: 1e-5 of the largest number; bfloat16: 2e-2, as the compiler rounds less often."""
    net = make_unet()
    plain = deepcopy(net)
    compile_network(net, "default", report=lambda line: None)
    results = []
    for each in (plain, net):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            out = each(*make_batch(3))
        out.float().square().mean().backward()
        results.append([out, *(p.grad for p in each.parameters() if p.grad is not None)])
    assert count_graphs() == 1
    share = 1e-5 if dtype is None else 2e-2
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= share * max(a.abs().max(), 1e-3)
