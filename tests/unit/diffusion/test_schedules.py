import math
import warnings
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest, laplace

from ldm.diffusion.samplers.spacing import space_timesteps
from ldm.diffusion.schedules import (
    DiscreteSchedule,
    FlowSchedule,
    LaplaceSchedule,
    cosine,
    expand_dims_like,
    linear,
    scaled_linear,
    sigmoid,
    sigmoid_alpha,
)

ORACLES = {
    "linear": (linear, {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
    "scaled_linear": (
        scaled_linear,
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ),
    "cosine": (cosine, {"beta_schedule": "squaredcos_cap_v2"}),
    "sigmoid": (sigmoid, {"beta_schedule": "sigmoid", "beta_start": 1e-4, "beta_end": 0.02}),
}
TABLES = [linear, scaled_linear, cosine, sigmoid, sigmoid_alpha]
ALL = [
    *(make() for make in TABLES),
    *(make(zero_terminal_snr=True) for make in TABLES),
    FlowSchedule(),
    FlowSchedule(shift=3.0),
    LaplaceSchedule(),
]


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("steps", [50, 1000, 4000])
@pytest.mark.parametrize("name", ORACLES)
def test_tables_are_those_of_diffusers(name, steps, zero):
    make, options = ORACLES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that 50 such betas end before the noise
        schedule = make(steps=steps, zero_terminal_snr=zero)
    oracle = DDPMScheduler(steps, rescale_betas_zero_snr=zero, **options)
    t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    alpha, sigma = schedule(t)
    expected = oracle.alphas_cumprod.double()  # built in float32 over there
    torch.testing.assert_close(alpha**2, expected, rtol=2e-5, atol=5e-6)
    torch.testing.assert_close(sigma**2, 1 - expected, rtol=2e-5, atol=5e-6)
    assert (alpha[-1] == 0) == zero
    betas = 1 - (alpha[1:] / alpha[:-1]) ** 2
    torch.testing.assert_close(betas, oracle.betas[1:].double(), rtol=0, atol=1e-5)
    assert torch.equal(schedule.timestep(t).round(), torch.arange(steps, dtype=torch.float64))


def test_sigmoid_alpha_matches_the_paper():
    """Chen 2023, algorithm 1, written out; up to the cap on the last beta."""
    t = torch.arange(1, 1000, dtype=torch.float64) / 1000

    def rising(x):
        return 1 / (1 + torch.exp(-torch.as_tensor(x, dtype=torch.float64) / 0.7))

    expected = (rising(2) - rising(-3 + 5 * t)) / (rising(2) - rising(-3))
    alpha, _ = sigmoid_alpha(start=-3, end=2, tau=0.7)(t)
    torch.testing.assert_close(alpha**2, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 7.0])
def test_flow_is_that_of_diffusers(shift):
    oracle, schedule = FlowMatchEulerDiscreteScheduler(shift=shift), FlowSchedule(shift=shift)
    t = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    alpha, sigma = schedule(t)
    torch.testing.assert_close(sigma, oracle.sigmas.double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(schedule.timestep(t), oracle.timesteps.double(), rtol=0, atol=1e-3)
    assert torch.allclose(alpha + sigma, torch.ones_like(t))
    # Sigmas as pipelines give them: without, diffusers shifts the ends twice (its issue 13243).
    for steps in (5, 20, 50):
        times = space_timesteps(schedule, steps)
        oracle.set_timesteps(sigmas=times[:-1].tolist())
        torch.testing.assert_close(schedule(times)[1], oracle.sigmas.double(), rtol=0, atol=1e-6)
    plain = FlowSchedule().log_snr(t[1:])
    torch.testing.assert_close(schedule.log_snr(t[1:]), plain - 2 * math.log(shift))


def test_laplace_log_snr_has_a_laplace_distribution():
    t = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    schedule = LaplaceSchedule(location=0.7, scale=0.5)
    assert kstest(schedule.log_snr(t).numpy(), laplace(0.7, 0.5).cdf).statistic < 1e-4
    alpha, sigma = schedule(t)
    torch.testing.assert_close(2 * (alpha / sigma).log(), schedule.log_snr(t))
    # What diffusers calls laplace takes alpha for alpha^2, so that its law is another.
    alpha_bar = DDPMScheduler(20_000, beta_schedule="laplace").alphas_cumprod.double()[:-1]
    theirs = (alpha_bar / (1 - alpha_bar)).log().numpy()
    assert kstest(theirs, laplace(0, 0.5).cdf).statistic > 0.2
    squared = alpha_bar.square()
    meant = (squared / (1 - squared)).log().numpy()
    assert kstest(meant, laplace(0, 0.5).cdf).statistic < 0.01


@pytest.mark.parametrize("name", ORACLES)
def test_add_noise_is_that_of_diffusers(name):
    make, options = ORACLES[name]
    schedule, oracle = make(), DDPMScheduler(**options)
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 1000, 3, 2, 2, generator=generator, dtype=torch.float64)
    k = torch.arange(1000)
    alpha, sigma = schedule((k + 1).double() / 1000)
    ours = expand_dims_like(alpha, x0) * x0 + expand_dims_like(sigma, x0) * eps
    torch.testing.assert_close(ours, oracle.add_noise(x0, eps, k), rtol=0, atol=1e-5)


@pytest.mark.parametrize("schedule", ALL)
def test_falls_from_data_to_noise(schedule):
    t = torch.linspace(0, 1, 4001, dtype=torch.float64)
    alpha, sigma = schedule(t)
    assert alpha[0] == 1
    assert sigma[0] == 0
    assert (alpha.diff() < 0).all()
    assert (sigma.diff() >= 0).all()
    assert (schedule.log_snr(t).diff() < 0).all()
    half = schedule(t.half())
    assert half[0].dtype == torch.float32, "a half-precision time must not make a coarse alpha"


@given(st.integers(1, 1000), st.sampled_from(["trailing", "leading", "linspace"]))
def test_timesteps_are_points_of_the_table_and_fall_to_zero(steps, spacing):
    times = space_timesteps(scaled_linear(), steps, spacing=spacing)
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
    times = space_timesteps(linear(), steps, spacing=spacing)
    assert torch.equal(linear().timestep(times[:-1]).round().long(), oracle.timesteps)


@pytest.mark.parametrize("offset", [0, 1])
def test_leading_has_the_whole_stride_of_diffusers_at_any_number_of_steps(offset):
    """Ours is their steps_offset=0, as in the paper's table; Stable Diffusion has 1."""
    oracle = DDIMScheduler(timestep_spacing="leading", steps_offset=offset)
    for steps in [*range(1, 60), 99, 100, 128, 250, 333, 334, 499, 501, 999, 1000]:
        oracle.set_timesteps(steps)
        times = space_timesteps(linear(), steps, spacing="leading")
        told = linear().timestep(times[:-1]).round().long()
        assert torch.equal(told + offset, oracle.timesteps)
    assert linear().timestep(space_timesteps(linear(), 30, spacing="leading"))[0].round() == 957


def test_leading_from_a_later_start_has_a_whole_stride_too():
    for strength, steps, first in ((0.7, 30, 29 * 23), (0.57, 10, 9 * 57), (0.29, 29, 280)):
        times = space_timesteps(linear(), steps, start=strength, spacing="leading")
        assert (times[0] * 1000).item() == pytest.approx(first + 1, abs=1e-9)
    # Without a table there are no whole numbers to keep to.
    even = space_timesteps(FlowSchedule(), 3, spacing="leading")
    torch.testing.assert_close(even[:-1] - 1e-3, torch.tensor([2 / 3, 1 / 3, 0]).double())


def test_impossible_grids_are_refused():
    with pytest.raises(ValueError, match="take steps="):
        space_timesteps(linear(), 1001)
    with pytest.raises(ValueError, match="take steps="):
        space_timesteps(linear(), 500, start=0.25)
    with pytest.raises(ValueError, match=r"steps=13 or fewer, or a start \(strength\) of 0.03 or"):
        space_timesteps(linear(), 30, start=0.0137)
    with pytest.raises(ValueError, match=r"of 1000: take a start \(strength\) of 0.03 or more"):
        space_timesteps(linear(), 30, start=0.0004, spacing="leading")
    with pytest.raises(ValueError, match="none of trailing"):
        space_timesteps(linear(), 10, spacing="trialing")
    with pytest.raises(ValueError, match="steps >= 1"):
        space_timesteps(linear(), 0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (partial(DiscreteSchedule, torch.tensor([0.1, 1.0])), "between 0 and 1"),
        (partial(DiscreteSchedule, torch.tensor([])), "between 0 and 1"),
        (partial(linear, end=1.5), "between 0 and 1"),
        (partial(scaled_linear, start=-0.1), "between 0 and 1"),
        (partial(linear, start=0.5, end=1e-30), "too small"),
        (partial(linear, steps=3000, end=0.9, zero_terminal_snr=True), "too many"),
        (partial(linear, steps=0), "steps must be a whole number above 0, got 0"),
        (partial(cosine, steps=-3), "got -3"),
        (partial(sigmoid, steps=10.5), "got 10.5"),
        (partial(cosine, max_beta=1.0), "between 0 and 1"),
        (partial(sigmoid_alpha, tau=0), "tau > 0"),
        (partial(sigmoid_alpha, start=3, end=-3), "start < end"),
        (partial(linear, steps=1, zero_terminal_snr=True), "at least two steps"),
        (partial(FlowSchedule, shift=0), "shift must be above 0"),
        (partial(FlowSchedule, shift=-3), "shift must be above 0"),
        (partial(LaplaceSchedule, scale=0), "scale must be above 0"),
        (partial(LaplaceSchedule, location=math.inf), "finite"),
    ],
)
def test_impossible_schedules_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_schedule_with_signal_at_the_end_warns():
    with pytest.warns(UserWarning, match="60% of the image.*zero_terminal_snr=true"):
        linear(steps=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for make in TABLES:
            make()
        linear(steps=100, start=1e-3, end=0.2)
        linear(steps=100, zero_terminal_snr=True)


STEPS = st.integers(2, 3000)
ZERO = st.booleans()
LEGAL = st.one_of(
    st.builds(
        lambda make, steps, start, more, zero: make(
            steps=steps, start=start, end=start + min(more, 300 / steps), zero_terminal_snr=zero
        ),
        st.sampled_from([linear, scaled_linear, sigmoid]),
        STEPS,
        st.floats(1e-6, 0.1),
        st.floats(0, 0.8),
        ZERO,
    ),
    st.builds(
        lambda steps, offset, cap, zero: cosine(
            steps=steps, offset=offset, max_beta=cap, zero_terminal_snr=zero
        ),
        STEPS,
        st.floats(0, 0.1),
        st.floats(0.5, 0.9999),
        ZERO,
    ),
    st.builds(
        lambda steps, start, width, tau, zero: sigmoid_alpha(
            steps=steps, start=start, end=start + width, tau=tau, zero_terminal_snr=zero
        ),
        STEPS,
        st.floats(-5, 2),
        st.floats(0.5, 6),
        st.floats(0.3, 2),
        ZERO,
    ),
    st.builds(lambda shift: FlowSchedule(shift=shift), st.floats(0.01, 100)),
    st.builds(
        lambda location, scale: LaplaceSchedule(location=location, scale=scale),
        st.floats(-5, 5),
        st.floats(0.05, 3),
    ),
)


@pytest.mark.filterwarnings("ignore:at t = 1 this noise schedule")
@settings(deadline=None)
@given(LEGAL)
def test_any_legal_schedule_falls_from_data_to_noise(schedule):
    t = torch.linspace(0, 1, 1501, dtype=torch.float64)
    alpha, sigma = schedule(t)
    assert alpha.isfinite().all()
    assert sigma.isfinite().all()
    assert (alpha >= 0).all()
    assert (alpha[0], sigma[0]) == (1, 0)
    if isinstance(schedule, FlowSchedule):
        assert torch.allclose(alpha + sigma, torch.ones_like(t))
    else:
        assert (alpha.square() + sigma.square() - 1).abs().max() < 1e-12
    log_snr = schedule.log_snr(t)
    assert not log_snr.isnan().any()
    assert (log_snr.diff() < 0).all()
    assert log_snr[0] == math.inf
    assert (log_snr[-1] == -math.inf) == (alpha[-1] == 0)


def test_log_snr_is_finite_where_alpha_underflows():
    end = torch.ones((), dtype=torch.float64)
    schedule = linear(steps=3000, end=0.9)
    assert schedule(end)[0] == 0
    assert -math.inf < schedule.log_snr(end) < -2000


@pytest.mark.parametrize("make", TABLES)
def test_the_last_step_to_zero_terminal_snr_has_no_jump(make):
    schedule = make(zero_terminal_snr=True)
    alpha, _ = schedule(torch.linspace(0.999, 1, 11, dtype=torch.float64))
    torch.testing.assert_close(alpha, alpha[0] * torch.linspace(1, 0, 11, dtype=torch.float64))
    first = torch.tensor([1 / 1000], dtype=torch.float64)
    torch.testing.assert_close(schedule(first), make()(first))


@given(st.floats(0, 1, exclude_max=True))
def test_snap_goes_to_the_table(t):
    snapped = linear().snap(torch.tensor([t], dtype=torch.float64)).item()
    assert 1 / 1000 <= snapped <= 1
    assert math.isclose(snapped * 1000, round(snapped * 1000), abs_tol=1e-9)
    assert t - 2e-6 <= snapped <= t + 0.001 + 2e-6


def test_snap_does_not_move_points_of_the_table():
    for dtype in (torch.float32, torch.float64):
        t = torch.arange(1, 1001, dtype=dtype) / 1000
        assert torch.equal(linear().snap(t), t)


def test_half_precision_modules_keep_an_exact_table():
    t = torch.tensor([0.123], dtype=torch.float64)
    assert torch.equal(cosine().bfloat16()(t)[0], cosine()(t)[0])
