"""FLOPs and memory of a step, counted without weights, against a step that runs."""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ldm.diffusion.conditioning import Condition
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.unet import UNet
from ldm.training.step_cost import count_step_cost

make_unet = partial(
    UNet,
    in_channels=4,
    out_channels=4,
    context_dim=16,
    multipliers=[1, 2],
    attention=[False, True],
    heads=2,
    groups=8,
)


def inputs(batch: int):
    return torch.zeros(batch, 4, 16, 16), Condition(tokens=torch.zeros(batch, 8, 16))


def count(*, batch: int = 4, half: torch.dtype | None = None, encode=lambda: None, **settings):
    with torch.device("meta"):
        net, (x, cond) = make_unet(**settings), inputs(batch)
    return count_step_cost(net, encode, x, cond, half=half)


@pytest.mark.parametrize("checkpointing", [(), "all"])
def test_flops_are_those_of_a_step_that_runs(checkpointing):
    cost = count(channels=16, checkpointing=checkpointing)
    net, (x, cond) = make_unet(channels=16, checkpointing=checkpointing), inputs(4)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = net(x, torch.zeros(4), cond).sum()
        forward = counter.get_total_flops()
        loss.backward()
    assert cost.forward_flops == forward
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_autocast_changes_no_flops_and_takes_less_memory():
    plain, half = count(channels=32), count(channels=32, half=torch.bfloat16)
    assert half.flops == plain.flops
    assert 0.4 * plain.activation_bytes < half.activation_bytes < 0.9 * plain.activation_bytes


def test_checkpointing_trades_memory_for_flops():
    plain, less = count(channels=32), count(channels=32, checkpointing="all")
    assert less.activation_bytes < plain.activation_bytes / 3
    assert less.forward_flops == plain.forward_flops
    assert plain.backward_flops < less.backward_flops <= plain.backward_flops + plain.forward_flops


def test_memory_grows_with_the_batch_and_gradients_do_not():
    one, two = count(channels=16, batch=8), count(channels=16, batch=16)
    assert two.activation_bytes == pytest.approx(2 * one.activation_bytes, rel=0.05)


def test_the_encoders_are_counted_by_themselves():
    with torch.device("meta"):
        autoencoder = AutoencoderKL(channels=16, groups=8).eval().requires_grad_(False)
        images = torch.zeros(4, 3, 64, 64)
    cost = count(channels=16, encode=lambda: autoencoder.encode(images))
    real = AutoencoderKL(channels=16, groups=8)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        real.encode(torch.zeros(4, 3, 64, 64))
    assert cost.encoder_flops == counter.get_total_flops()
    assert cost.encoder_bytes > 4 * 3 * 64 * 64 * 4


STEP = """
import sys, gc, ctypes, torch
sys.path.insert(0, {folder!r})
from test_step_cost import make_unet, inputs
torch.set_num_threads(1)
net = make_unet(channels=96, checkpointing={checkpointing!r})
net(inputs(1)[0], torch.zeros(1), inputs(1)[1]).sum().backward()  # libraries get ready
net.zero_grad(set_to_none=True)
gc.collect()
ctypes.CDLL("libc.so.6").malloc_trim(0)

def read(name):
    return int(open("/proc/self/status").read().split(name + ":")[1].split()[0]) * 1024

before = read("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # VmHWM begins anew
x, cond = inputs(64)
torch.nn.functional.mse_loss(net(x, torch.zeros(64), cond), x).backward()
print("peak", read("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux")
@pytest.mark.parametrize("checkpointing", [(), "all"])
def test_the_peak_is_that_of_a_process_that_runs_the_step(checkpointing):
    cost = count(channels=96, batch=64, checkpointing=checkpointing)
    code = STEP.format(folder=str(Path(__file__).parent), checkpointing=checkpointing)
    small = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=small, capture_output=True, text=True, check=True
    )
    real = int(re.search(r"peak (\d+)", done.stdout)[1])
    assert cost.backward_bytes == pytest.approx(real, rel=0.15)
