import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ldm.diffusion.conditioning import Condition
from ldm.diffusion.objective import Objective
from ldm.diffusion.predictions import PREDICTIONS, Prediction
from ldm.diffusion.rng import randn
from ldm.diffusion.schedules import (
    FlowSchedule,
    LaplaceSchedule,
    cosine,
    expand_dims_like,
    linear,
    scaled_linear,
    sigmoid,
)
from ldm.diffusion.timesteps import PowerTimestepSampler
from ldm.diffusion.weightings import (
    DebiasedWeighting,
    EDMWeighting,
    MinSNRWeighting,
    P2Weighting,
    SoftMinSNRWeighting,
    UniformWeighting,
)

DEFINED_ON_X0 = [
    MinSNRWeighting(),
    SoftMinSNRWeighting(),
    P2Weighting(),
    P2Weighting(gamma=0.5, k=2.0),
    EDMWeighting(),
    DebiasedWeighting(),
]
SCHEDULES = [
    linear(),
    cosine(),
    scaled_linear(zero_terminal_snr=True),
    FlowSchedule(shift=3.0),
    LaplaceSchedule(),
]
T = torch.arange(1, 1001, dtype=torch.float64) / 1000


def objective(schedule, kind, weighting):
    times = PowerTimestepSampler()
    return Objective(schedule, Prediction(kind), weighting=weighting, timestep_sampler=times)


def legal(schedule, weighting):
    """The predictions that go with both: v and flow always do."""
    found = []
    for kind in PREDICTIONS:
        try:
            objective(schedule, kind, weighting)
            found.append(kind)
        except ValueError:
            if kind in ("v", "flow"):
                raise
    return found


def weights(schedule, kind, weighting, t=T):
    return objective(schedule, kind, weighting).weight(t)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("make", [linear, scaled_linear, cosine, sigmoid])
def test_min_snr_is_that_of_diffusers(make, zero, gamma):
    """As its training scripts have it since pull request 6307, on the same alphas."""
    schedule, oracle = make(zero_terminal_snr=zero), DDPMScheduler(1000)
    oracle.alphas_cumprod = schedule(T)[0] ** 2
    snr = compute_snr(oracle, torch.arange(1000)).double()
    least = snr.clamp(max=gamma)
    expected = {"v": least / (snr + 1), "x0": least}
    if not zero:  # 0 / 0 at the end over there, refused here
        expected["eps"] = least / snr
    for kind, weight in expected.items():
        ours = weights(schedule, kind, MinSNRWeighting(gamma))
        torch.testing.assert_close(ours, weight, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(
    ("weighting", "eps", "v", "x0"),
    [
        (UniformWeighting(), lambda r: r**0, lambda r: r**0, lambda r: r**0),
        (
            SoftMinSNRWeighting(4.0),
            lambda r: 4 / (r + 4),
            lambda r: 4 * r / (r + 4) / (r + 1),
            lambda r: 4 * r / (r + 4),
        ),
        (
            P2Weighting(gamma=0.5, k=2.0),
            lambda r: (2 + r) ** -0.5,
            lambda r: r / (r + 1) * (2 + r) ** -0.5,
            lambda r: r * (2 + r) ** -0.5,
        ),
        (EDMWeighting(0.5), lambda r: (r + 4) / r, lambda r: (r + 4) / (r + 1), lambda r: r + 4),
        (EDMWeighting(1.0), lambda r: (r + 1) / r, lambda r: r**0, lambda r: r + 1),
        (DebiasedWeighting(), lambda r: r**-0.5, lambda r: r**0.5 / (r + 1), lambda r: r**0.5),
    ],
)
def test_published_forms(weighting, eps, v, x0):
    """Each law as its paper writes it, for each prediction, of r = SNR."""
    alpha, sigma = linear()(T)
    r = (alpha / sigma) ** 2
    for kind, published in {"eps": eps, "v": v, "x0": x0}.items():
        torch.testing.assert_close(weights(linear(), kind, weighting), published(r))


def test_edm_weighting_matches_edm():
    """lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 at their sigma = sigma / alpha."""
    alpha, sigma = cosine()(T)
    theirs = (sigma / alpha) ** 2
    published = (theirs + 0.25) / (theirs * 0.25)
    torch.testing.assert_close(weights(cosine(), "x0", EDMWeighting()), published)


@settings(deadline=None)
@given(
    st.sampled_from(sorted(PREDICTIONS)),
    st.sampled_from(SCHEDULES),
    st.floats(0.001, 0.999),
    st.integers(0, 99),
)
def test_gain_is_the_ratio_of_squared_errors(kind, schedule, t, seed):
    """From two outputs: how far they are apart, and how far the x0_hat that they mean."""
    generator, prediction = torch.Generator().manual_seed(seed), Prediction(kind)
    x_t, a, b = torch.randn(3, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    alpha, sigma = schedule(torch.full((2,), t, dtype=torch.float64))
    to_x0 = prediction.to_x0
    apart = to_x0(a, x_t, alpha, sigma) - to_x0(b, x_t, alpha, sigma)
    gain = (a - b).square().flatten(1).sum(1) / apart.square().flatten(1).sum(1)
    torch.testing.assert_close(prediction.gain(alpha, sigma), gain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weighting", DEFINED_ON_X0, ids=lambda w: type(w).__name__)
@pytest.mark.parametrize(
    "schedule", [linear(), sigmoid(), cosine(zero_terminal_snr=True), FlowSchedule()]
)
def test_one_estimate_has_one_loss_whatever_is_predicted(schedule, weighting):
    """Networks that mean the same x0_hat, in other words: the weights know the words apart."""
    x0, eps = randn((2, 64, 2, 4, 4), torch.Generator().manual_seed(5), dtype=torch.float64)
    t = torch.linspace(0.02, 0.98, 64, dtype=torch.float64)
    alpha, sigma = (expand_dims_like(part, x0) for part in schedule(schedule.snap(t)))

    def loss(kind):
        task = objective(schedule, kind, weighting)

        def net(x_t, timestep, cond):
            x0_hat = x_t.tanh()
            return task.prediction.target(x0_hat, (x_t - alpha * x0_hat) / sigma, alpha, sigma)

        return task.loss_at(net, x0, Condition(), t=t, eps=eps)

    for kind in legal(schedule, weighting):
        torch.testing.assert_close(loss(kind), loss("v"), rtol=1e-8, atol=0)
    assert loss("v").std() > 0.01


LAWS = st.one_of(
    st.just(UniformWeighting()),
    st.builds(MinSNRWeighting, st.floats(0.01, 100)),
    st.builds(SoftMinSNRWeighting, st.floats(0.01, 100)),
    st.builds(P2Weighting, st.floats(0, 3), st.floats(0.01, 10)),
    st.builds(EDMWeighting, st.floats(0.1, 10)),
    st.just(DebiasedWeighting()),
)


@settings(deadline=None)
@given(st.sampled_from(sorted(PREDICTIONS)), st.sampled_from(SCHEDULES), LAWS)
def test_weights_are_finite_at_every_time(kind, schedule, law):
    """Also without any noise (t = 0) and without any signal; what has no bound is refused."""
    assume(kind != "eps" or schedule(torch.ones(1))[0] > 0)
    t = torch.cat([torch.zeros(1), torch.logspace(-12, 0, 50), torch.ones(1)]).double()
    try:
        weight = weights(schedule, kind, law, schedule.snap(t))
    except ValueError as refused:
        if kind not in ("x0", "eps") or "take objective=v" not in str(refused):
            raise
        return
    assert weight.isfinite().all()
    assert (weight >= 0).all()
    assert weight.max() < 1e6


@pytest.mark.parametrize(
    "law", [*DEFINED_ON_X0, UniformWeighting()], ids=lambda w: type(w).__name__
)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["v", "flow"])
def test_v_and_flow_take_any_weighting(kind, schedule, law):
    weight = weights(schedule, kind, law)
    assert weight.isfinite().all()
    assert weight.max() > 0.1
    if schedule(torch.ones(1))[0] == 0 and isinstance(law, MinSNRWeighting):
        assert weight[-1] < 1e-20, "nothing of the end is trained"


def test_weights_reach_their_limits_without_signal_or_noise():
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)  # SNR infinite, then 0
    for law, expected in {
        MinSNRWeighting(5.0): [0.0, 0.0],
        P2Weighting(): [0.0, 0.0],
        EDMWeighting(0.5): [1.0, 4.0],
        DebiasedWeighting(): [0.0, 0.0],
        UniformWeighting(): [1.0, 1.0],
    }.items():
        for kind in ("v", "flow"):
            limits = torch.tensor(expected, dtype=torch.float64)
            found = weights(FlowSchedule(), kind, law, ends)
            torch.testing.assert_close(found, limits, rtol=1e-9, atol=1e-9)
    x0 = weights(FlowSchedule(), "x0", MinSNRWeighting(5.0), ends)
    torch.testing.assert_close(x0, torch.tensor([5.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("schedule", "kind", "law"),
    [
        (FlowSchedule(), "x0", EDMWeighting()),
        (FlowSchedule(), "x0", DebiasedWeighting()),
        (LaplaceSchedule(), "x0", P2Weighting(gamma=0.5)),
        (cosine(), "eps", EDMWeighting()),
    ],
)
def test_weights_without_bound_are_refused(schedule, kind, law):
    with pytest.raises(ValueError, match=f"objective={kind}.*take objective=v"):
        objective(schedule, kind, law)
    objective(schedule, "v", law)


@pytest.mark.parametrize(
    ("make", "value", "name"),
    [
        (MinSNRWeighting, 0.0, "gamma"),
        (SoftMinSNRWeighting, -1.0, "gamma"),
        (SoftMinSNRWeighting, float("nan"), "gamma"),
        (P2Weighting, -0.1, "gamma"),
        (lambda k: P2Weighting(1.0, k), 0.0, "k"),
        (EDMWeighting, 0.0, "sigma_data"),
        (MinSNRWeighting, float("inf"), "gamma"),
    ],
)
def test_impossible_weightings_are_refused(make, value, name):
    with pytest.raises(ValueError, match=f"weighting.{name}"):
        make(value)
