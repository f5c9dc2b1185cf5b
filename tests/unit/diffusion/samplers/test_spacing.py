import math

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import SCHEDULES, STEPS, in_double

from ldm.diffusion.samplers.ddim import DDIMSampler
from ldm.diffusion.samplers.spacing import (
    MAX_NOISE_RATIO,
    SPACING_TRANSFORMS,
    SPACINGS,
    space_timesteps,
)
from ldm.diffusion.schedules import (
    FlowSchedule,
    LaplaceSchedule,
    cosine,
    linear,
    scaled_linear,
    sigmoid,
    sigmoid_alpha,
)

TABLES = [linear, scaled_linear, cosine, sigmoid, sigmoid_alpha]
ALL = [
    *(make() for make in TABLES),
    *(make(zero_terminal_snr=True) for make in TABLES),
    *(FlowSchedule(), FlowSchedule(shift=3.0), LaplaceSchedule()),
]


@settings(max_examples=50)
@given(st.sampled_from(ALL), st.integers(1, 100), st.floats(0.2, 1.0), st.sampled_from(SPACINGS))
def test_grids_fall_from_their_start_to_zero(schedule, steps, start, spacing):
    times = space_timesteps(schedule, steps, start=start, spacing=spacing)
    assert times.shape == (steps + 1,)
    assert times.dtype == torch.float64
    assert times[-1] == 0
    assert (times.diff() < 0).all()
    assert times[0] <= start + 1e-3
    if spacing in SPACING_TRANSFORMS:
        assert times[0] == start
        r = schedule.noise_to_signal_ratio(times[1:-1])
        assert r.isfinite().all()
        assert (r <= MAX_NOISE_RATIO * (1 + 1e-9)).all()


@settings(max_examples=50)
@given(st.sampled_from(ALL), st.floats(-8, 5))
def test_timesteps_at_ratio_inverts_the_schedule(schedule, log_r):
    r = torch.tensor([math.exp(log_r)], dtype=torch.float64)
    t = schedule.timesteps_at_ratio(r)
    ends = torch.tensor([1e-9, 1.0], dtype=torch.float64)
    least, most = schedule.noise_to_signal_ratio(ends).tolist()
    if least < r < most:
        torch.testing.assert_close(schedule.noise_to_signal_ratio(t), r, rtol=1e-6, atol=0)
    else:
        assert t in (0, 1) or r < least


def test_ratios_outside_the_schedule_give_its_ends():
    for schedule in ALL:
        r = torch.tensor([0.0, math.inf], dtype=torch.float64)
        assert schedule.timesteps_at_ratio(r).tolist() == [0, 1]


@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_karras_is_that_of_diffusers(name, monkeypatch):
    in_double(monkeypatch, diffusers.EulerDiscreteScheduler, diffusers.DPMSolverMultistepScheduler)
    schedule, table = SCHEDULES[name]
    for steps in STEPS:
        times = space_timesteps(schedule, steps, spacing="karras")
        r = schedule.noise_to_signal_ratio(times)
        # Theirs ends at the ends of its own grid, which are those of the table with linspace.
        for cls in (diffusers.EulerDiscreteScheduler, diffusers.DPMSolverMultistepScheduler):
            oracle = cls(**table, use_karras_sigmas=True, timestep_spacing="linspace")
            oracle.set_timesteps(steps)
            torch.testing.assert_close(r, oracle.sigmas, rtol=1e-9, atol=1e-12)
    # Theirs tells the network a rounded time: half a step beside the level it is at, or less.
    assert (oracle.timesteps - schedule.timestep(times[:-1])).abs().max() > 0.3


@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_logsnr_is_that_of_diffusers(name, monkeypatch):
    """Which goes from sigma to sigma in even logarithms: use_lu_lambdas, and exponential."""
    in_double(monkeypatch, diffusers.DPMSolverMultistepScheduler)
    schedule, table = SCHEDULES[name]
    for told in ("use_lu_lambdas", "use_exponential_sigmas"):
        oracle = diffusers.DPMSolverMultistepScheduler(**table, **{told: True})
        for steps in STEPS:
            oracle.set_timesteps(steps)
            r = schedule.noise_to_signal_ratio(space_timesteps(schedule, steps, spacing="logsnr"))
            torch.testing.assert_close(r, oracle.sigmas, rtol=1e-9, atol=1e-12)


def test_ays_is_even_in_the_angle():
    times = space_timesteps(FlowSchedule(), 8, spacing="ays")
    angle = FlowSchedule().noise_to_signal_ratio(times).atan()
    assert (angle[1:].diff() - angle[1:].diff().mean()).abs().max() < 1e-9
    # The angle of cosine is even in t, but for the offset at its end.
    trailing = space_timesteps(cosine(), 10)
    assert (space_timesteps(cosine(), 10, spacing="ays") - trailing).abs().max() < 0.01


@pytest.mark.parametrize(
    "schedule", [linear(), scaled_linear(), FlowSchedule()], ids=["l", "s", "f"]
)
def test_no_grid_is_better_than_ays_for_ddim_on_normal_data(schedule):
    def denoise(x_t, t):
        alpha, sigma = schedule(t)
        return alpha * x_t / (alpha**2 + sigma**2)

    def error(times):
        """Of the scale; data of unit variance keeps that of x at t = 1 for ever."""
        x0 = DDIMSampler()(denoise, torch.ones(1, 1, 1, 1).double(), schedule, times, noise=None)
        return 1 - x0.item() / exact

    alpha, sigma = schedule(torch.ones((), dtype=torch.float64))
    exact = (alpha**2 + sigma**2).rsqrt().item()
    generator = torch.Generator().manual_seed(0)
    for steps in (5, 10, 20):
        best = space_timesteps(schedule, steps, spacing="ays")
        for spacing in {*SPACINGS} - {"ays", "leading"}:  # which does not begin in noise
            assert error(space_timesteps(schedule, steps, spacing=spacing)) > error(best) > 0
        for _ in range(20):
            moved = best * (1 + 0.02 * torch.randn(steps + 1, generator=generator))
            moved[0] = best[0]
            assert error(moved) > error(best) - 1e-9


def test_impossible_grids_are_refused():
    with pytest.raises(ValueError, match=r"none of trailing, .*karras"):
        space_timesteps(linear(), 10, spacing="trialing")
    for spacing in SPACINGS:
        with pytest.raises(ValueError, match="steps >= 1"):
            space_timesteps(linear(), 0, spacing=spacing)
        with pytest.raises(ValueError, match="start <= 1"):
            space_timesteps(linear(), 5, start=0.0, spacing=spacing)
    with pytest.raises(ValueError, match="take fewer steps"):
        space_timesteps(linear(), 5, start=0.0005, spacing="karras")
