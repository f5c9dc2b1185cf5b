"""The shift of a schedule by the size of the data."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ldm.diffusion.resolution_shift import compute_shift
from ldm.diffusion.schedules import FlowSchedule

TIMES = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000


@pytest.mark.parametrize(
    ("elements", "base", "shift"),
    [
        (4 * 32 * 32, 4096, 1.0),  # 256 px in Stable Diffusion's latents
        (4 * 64 * 64, 4096, 2.0),
        (1024**2, 256**2, 4.0),  # Esser et al. 2024, section 5.3.2: 1024 px, from 256 px
        (16 * 16 * 768, 4096, math.sqrt(48)),  # Zheng et al. 2025: DINOv2-B's latents of 256 px
    ],
)
def test_the_shift_is_that_of_the_papers(elements, base, shift):
    assert compute_shift(elements, base) == pytest.approx(shift)


@pytest.mark.parametrize("side", [32, 64, 128, 256, 512])
def test_log_snr_moves_as_in_simple_diffusion(side):
    """Hoogeboom et al. 2023, equation 5: log SNR + 2 log(64 / d), for images of side d."""
    schedule = FlowSchedule(shift=compute_shift(side**2, 64**2))
    moved = schedule.log_snr(TIMES) - FlowSchedule().log_snr(TIMES)
    expected = torch.full_like(moved[1:], 2 * math.log(64 / side))
    torch.testing.assert_close(moved[1:], expected)


@pytest.mark.parametrize("elements", [768, 4096, 16384, 262144])
def test_the_schedule_is_that_of_diffusers_dynamic_shifting(elements):
    shift = compute_shift(elements, 4096)
    oracle = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    oracle.set_timesteps(sigmas=TIMES.tolist(), mu=math.log(shift))
    sigmas = FlowSchedule(shift=shift)(TIMES)[1]
    torch.testing.assert_close(sigmas, oracle.sigmas[:-1].double(), rtol=0, atol=1e-6)
