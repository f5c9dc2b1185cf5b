import math

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from ldm.diffusion.schedule import Flow, Tabled, cosine, expand, linear, scaled_linear

ORACLES = {
    "linear": (linear, {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
    "scaled_linear": (
        scaled_linear,
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ),
    "cosine": (cosine, {"beta_schedule": "squaredcos_cap_v2"}),
}
ALL = [linear(), scaled_linear(), cosine(), Flow()]


@pytest.mark.parametrize("name", ORACLES)
def test_tables_are_those_of_diffusers(name):
    make, options = ORACLES[name]
    schedule, oracle = make(), DDPMScheduler(**options)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    alpha, sigma = schedule(t)
    expected = oracle.alphas_cumprod.double()  # built in float32 over there
    torch.testing.assert_close(alpha**2, expected, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(sigma**2, 1 - expected, rtol=2e-5, atol=1e-6)
    assert torch.equal(schedule.timestep(t).round(), torch.arange(1000, dtype=torch.float64))


@pytest.mark.parametrize("name", ORACLES)
def test_add_noise_is_that_of_diffusers(name):
    make, options = ORACLES[name]
    schedule, oracle = make(), DDPMScheduler(**options)
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 1000, 3, 2, 2, generator=generator, dtype=torch.float64)
    k = torch.arange(1000)
    alpha, sigma = schedule((k + 1).double() / 1000)
    ours = expand(alpha, x0) * x0 + expand(sigma, x0) * eps
    torch.testing.assert_close(ours, oracle.add_noise(x0, eps, k), rtol=0, atol=1e-5)


@pytest.mark.parametrize("schedule", ALL)
def test_falls_from_data_to_noise(schedule):
    t = torch.linspace(0, 1, 4001, dtype=torch.float64)
    alpha, sigma = schedule(t)
    assert alpha[0] == 1
    assert sigma[0] == 0
    assert (alpha.diff() < 0).all()
    assert (sigma.diff() >= 0).all()
    assert (schedule.log_snr(t[1:-1]).diff() < 0).all()
    half = schedule(t.half())
    assert half[0].dtype == torch.float32, "a half-precision time must not make a coarse alpha"


@given(st.integers(1, 1000), st.sampled_from(["trailing", "leading", "linspace"]))
def test_times_lie_on_the_table_and_fall_to_zero(steps, spacing):
    times = scaled_linear().times(steps, spacing=spacing)
    assert times.shape == (steps + 1,)
    assert times[-1] == 0
    assert (times.diff() < 0).all()
    assert torch.allclose((times * 1000).round() / 1000, times, rtol=0, atol=1e-12)
    if spacing == "trailing":
        assert times[0] == 1


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [5, 20, 50, 1000])
def test_times_are_those_of_diffusers(spacing, steps):
    oracle = DDPMScheduler(timestep_spacing=spacing)
    oracle.set_timesteps(steps)
    times = linear().times(steps, spacing=spacing)
    assert torch.equal(linear().timestep(times[:-1]).round().long(), oracle.timesteps)


def test_impossible_grids_are_refused():
    with pytest.raises(ValueError, match="take fewer steps"):
        linear().times(1001)
    with pytest.raises(ValueError, match="take fewer steps"):
        linear().times(500, start=0.25)
    with pytest.raises(ValueError, match="none of trailing"):
        linear().times(10, spacing="trialing")
    with pytest.raises(ValueError, match="steps >= 1"):
        linear().times(0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        Tabled(torch.tensor([0.1, 1.0]))


@given(st.floats(0, 1, exclude_max=True))
def test_snap_goes_to_the_table(t):
    snapped = linear().snap(torch.tensor([t], dtype=torch.float64)).item()
    assert 1 / 1000 <= snapped <= 1
    assert math.isclose(snapped * 1000, round(snapped * 1000), abs_tol=1e-9)
    assert t - 2e-6 <= snapped <= t + 0.001 + 2e-6


def test_snap_leaves_points_of_the_table_alone():
    for dtype in (torch.float32, torch.float64):
        t = torch.arange(1, 1001, dtype=dtype) / 1000
        assert torch.equal(linear().snap(t), t)


def test_half_precision_modules_keep_an_exact_table():
    t = torch.tensor([0.123], dtype=torch.float64)
    assert torch.equal(cosine().bfloat16()(t)[0], cosine()(t)[0])
