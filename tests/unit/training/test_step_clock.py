"""The parts of a step, its FLOPs, and the share of the peak."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from world import CAPTIONS, latent_diffusion, make_trainer, shapes_data, unet

from ldm.diffusion.conditioning import Condition
from ldm.models.compilation import compile_network
from ldm.models.unet import UNet
from ldm.training.callbacks.monitoring import ThroughputMonitor
from ldm.training.loggers.csv import CsvLog
from ldm.training.step_clock import StepClock, count_forward_flops, find_peak_tflops

PARTS = {"data", "encoders", "denoiser", "backward", "optimizer"}


def train(tiny_text, shapes, *, steps: int, every: int, accumulate: int = 1, **settings):
    """The logged rows, and the module."""
    module, rows = latent_diffusion(tiny_text), []
    trainer = make_trainer(steps=steps, accumulate=accumulate)
    trainer.callbacks[0] = ThroughputMonitor(
        every=every, count_flops=module.count_flops, **settings
    )
    log = CsvLog("unused.csv")
    log.log_metrics = lambda metrics, step=None: rows.append({"at": step, **metrics})
    trainer.loggers = [log]
    log.save = log.rewind = log.finalize = lambda *args: None
    trainer.fit(module, datamodule=shapes_data(shapes))
    return [row for row in rows if "train/loss" in row], module


def test_parts_of_a_name_are_added():
    clock = StepClock()
    clock.mark("ignored, as it does not run")
    clock.start(torch.device("cpu"))
    clock.marks = [("", 0.0), ("data", 1.0), ("backward", 4.0), ("data", 5.0), ("backward", 10.0)]
    assert clock.read_shares() == {"data": 0.2, "backward": 0.8}
    assert not clock.runs
    assert clock.read_shares() == {}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_shares_of_a_logged_step_are_logged(tiny_text, shapes, accumulate):
    rows, _ = train(tiny_text, shapes, steps=6, every=3, accumulate=accumulate)
    assert [row["at"] for row in rows] == [3, 6]
    for row in rows:
        shares = {name: value for name, value in row.items() if name.startswith("perf/share_")}
        assert shares.keys() == {f"perf/share_{part}" for part in PARTS}
        assert sum(shares.values()) == pytest.approx(1)
        images = row["perf/images_per_s"] * row["perf/step_ms"] / 1000
        assert images == pytest.approx(4)
        assert "perf/mfu" not in row, "a CPU's peak is not known"


def test_the_share_of_the_peak_is_that_of_the_counted_operations(tiny_text, shapes):
    rows, module = train(tiny_text, shapes, steps=2, every=1, peak_tflops=1e-3)
    assert module.captions == 8 + 10, "of two steps and the validation"
    for row in rows:
        flops = row["perf/mfu"] * 1e9 * row["perf/step_ms"] / 1000
        assert [pytest.approx(flops)] == [*module.trainer.callbacks[0].flops.values()]


def test_operations_are_those_of_a_forward_and_a_backward_pass(tiny_text):
    net = unet(tiny_text)
    cond = tiny_text(CAPTIONS[:4])
    x, t = torch.randn(4, 3, 16, 16), torch.rand(4)
    said: list[str] = []
    compile_network(net, "default", backend="eager", report=said.append)
    state = torch.get_rng_state()
    counted = 3 * count_forward_flops(net, x, t, cond)
    assert not said, "it is not compiled"
    net._compiled_call_impl = None
    assert torch.equal(state, torch.get_rng_state())
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        net(x, t, cond).sum().backward()
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.03)
    as_autocast_gives_them = x.bfloat16(), t, cond.map(torch.Tensor.bfloat16)
    assert 3 * count_forward_flops(net, *as_autocast_gives_them) == counted


def test_counting_leaves_nothing_behind(tiny_text):
    """Positional maps keep their cosines, but not those that are shapes alone."""
    sizes = {"channels": 8, "multipliers": (1,), "blocks": 1, "heads": 2, "groups": 8}
    channels = {"in_channels": 3, "out_channels": 3, "context_dim": 0, "attention": (True,)}
    net = UNet(**sizes, **channels, positional_waves=3)
    inputs = torch.randn(2, 3, 4, 12), torch.rand(2), Condition()
    count_forward_flops(net, *inputs)
    assert net(*inputs).isfinite().all()


def test_a_network_whose_operations_cannot_be_counted_is_trained(tiny_text, shapes):
    class Odd(torch.nn.Conv2d):
        def forward(self, x, t, cond: Condition):
            return super().forward(x) * float(self.weight.flatten()[0].detach().cpu().numpy())

    module = latent_diffusion(tiny_text)
    monitor = ThroughputMonitor(every=1, peak_tflops=1.0, count_flops=module.count_flops)
    module.ema.module = Odd(3, 3, 1)
    trainer = make_trainer(steps=1)
    trainer.callbacks[0] = monitor
    module.optimizer_step = lambda epoch, i, optimizer, closure: optimizer.step(closure)
    with pytest.warns(UserWarning, match=r"perf/mfu is left out: FLOPs cannot be counted"):
        trainer.fit(module, datamodule=shapes_data(shapes))
    assert "perf/mfu" not in monitor.latest


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H200", "bf16-mixed", 989),
        ("NVIDIA H200", "32-true", 494),
        ("NVIDIA H200", "64-true", None),
        ("NVIDIA H100 PCIe", "bf16-mixed", 756),
        ("NVIDIA H100 80GB HBM3", "16-mixed", 989),
        ("NVIDIA A100-SXM4-80GB", "bf16-mixed", 312),
        ("NVIDIA A10G", "bf16-mixed", 70),
        ("NVIDIA L40S", "bf16-mixed", 362),
        ("NVIDIA L4", "bf16-mixed", 121),
        ("NVIDIA RTX A1000", "bf16-mixed", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16-mixed", None),
    ],
)
def test_the_peak_goes_by_the_name_of_the_device(monkeypatch, name, precision, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert find_peak_tflops(torch.device("cuda"), precision) == peak
    assert find_peak_tflops(torch.device("cpu"), precision) is None
