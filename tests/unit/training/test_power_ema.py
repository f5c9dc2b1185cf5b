"""Averages by a power of time against their definition, and those that are put together later."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from test_ema import Net, steps

from ldm.training.power_ema import (
    MAX_EMA_LENGTH,
    EMAProfile,
    PowerEMA,
    length_to_exponent,
    profile_inner_products,
    solve_mixture,
)

STEPS, EVERY, TRACKS = 800, 40, (0.05, 0.10)
SOME = [EMAProfile(0.05, 30), EMAProfile(0.25, 70), EMAProfile(0.1, 70), EMAProfile(0.02, 500)]


def exponent_to_length(gamma: float) -> float:
    """The profile's standard deviation as a share of the run."""
    return ((gamma + 1) / (gamma + 3)) ** 0.5 / (gamma + 2)


def walk(size: int = 500) -> np.ndarray:
    """Weights (STEPS, size) after each step, as a random walk leaves them."""
    drawn = np.random.default_rng(0).standard_normal((STEPS, size))
    return np.cumsum(drawn, axis=0)


def average(weights: np.ndarray, length: float) -> np.ndarray:
    """The average after each step, all steps at once: bins of the profile, from its integral."""
    power = length_to_exponent(length) + 1
    ends = np.arange(len(weights) + 1) ** power
    return np.cumsum(np.diff(ends)[:, None] * weights, axis=0) / ends[1:, None]


@pytest.mark.parametrize("length", [0.001, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.28])
def test_length_and_exponent_are_each_others_inverse(length):
    assert exponent_to_length(length_to_exponent(length)) == pytest.approx(length, rel=1e-9)


def test_lengths_are_those_of_the_paper():
    """Its table of sigma_rel 0.05, 0.10: gamma 16.97, 6.94; and the deviation of the profile."""
    assert length_to_exponent(0.05) == pytest.approx(16.97, abs=0.005)
    assert length_to_exponent(0.10) == pytest.approx(6.94, abs=0.005)
    assert length_to_exponent(MAX_EMA_LENGTH) == pytest.approx(0, abs=1e-6)
    gamma = 3.5
    mean, square = (quad(lambda s, n=n: (gamma + 1) * s ** (gamma + n), 0, 1)[0] for n in (1, 2))
    assert exponent_to_length(gamma) == pytest.approx((square - mean**2) ** 0.5)


@pytest.mark.parametrize("length", [0, -0.1, 0.29, 1, float("nan")])
def test_a_length_out_of_range_is_refused(length):
    with pytest.raises(ValueError, match=r"above 0 and at most 0.2887 .*, not"):
        length_to_exponent(length)


def test_overlaps_are_integrals():
    def profile(one: EMAProfile, s: float) -> float:
        gamma = length_to_exponent(one.length)
        return (gamma + 1) * s**gamma / one.step ** (gamma + 1) * (s <= one.step)

    found = profile_inner_products(SOME, SOME)
    assert np.array_equal(found, found.T)
    for i, a in enumerate(SOME):
        for j, b in enumerate(SOME):
            end = min(a.step, b.step)
            expected = quad(lambda s, a=a, b=b: profile(a, s) * profile(b, s), 0, end)[0]
            assert found[i, j] == pytest.approx(expected, rel=1e-6)


def test_long_runs_do_not_overflow():
    kept = [EMAProfile(each, 10**7 + step) for step in (0, 10**5) for each in (0.001, 0.1)]
    assert np.isfinite(profile_inner_products(kept, kept)).all()
    assert solve_mixture(kept, kept[2]).misfit < 1e-6


def test_a_stored_profile_is_its_own_mixture():
    for i, wanted in enumerate(SOME):
        made = solve_mixture(SOME, wanted)
        np.testing.assert_allclose(made.shares, np.eye(len(SOME))[i], atol=1e-9)
        assert made.misfit < 1e-6


@pytest.mark.parametrize("length", [0.01, 0.07, 0.2, 0.28])
def test_shares_add_up_to_one(length):
    assert solve_mixture(SOME, EMAProfile(length, 500)).shares.sum() == pytest.approx(1, abs=1e-9)


def test_no_shares_that_add_up_to_one_fit_better():
    wanted = EMAProfile(0.07, 500)
    shares, misfit = solve_mixture(SOME, wanted)
    gram, target = profile_inner_products(SOME, SOME), profile_inner_products(SOME, [wanted])[:, 0]
    own = profile_inner_products([wanted], [wanted])[0, 0]
    rng = np.random.default_rng(0)
    for _ in range(100):
        change = rng.standard_normal(len(SOME)) * 1e-3
        other = shares + change - change.mean()
        square = 1 - 2 * other @ target / own + other @ gram @ other / own
        assert square > misfit**2


def test_stored_averages_reconstruct_others():
    """On a random walk, within a few percent of what the average itself differs from others."""
    weights = walk()
    tracks = {each: average(weights, each) for each in TRACKS}
    at = [EMAProfile(each, step) for step in range(EVERY, STEPS + 1, EVERY) for each in TRACKS]
    kept = np.stack([tracks[length][step - 1] for length, step in at])
    last = tracks[0.05][-1]
    for length in (0.03, 0.07, 0.13, 0.15, 0.2):
        shares, misfit = solve_mixture(at, EMAProfile(length, STEPS))
        expected = average(weights, length)[-1]
        error = np.linalg.norm(shares @ kept - expected)
        assert error < 0.03 * np.linalg.norm(expected - last), length
        assert misfit < 0.1
    shares, misfit = solve_mixture(at, EMAProfile(0.005, STEPS))
    assert misfit > 0.3, "what is out of reach says so"
    alone = solve_mixture([one for one in at if one.length == 0.05], EMAProfile(0.15, STEPS))
    assert alone.misfit > 3 * solve_mixture(at, EMAProfile(0.15, STEPS)).misfit


def test_no_profiles_or_equal_ones_are_refused():
    with pytest.raises(ValueError, match="different profiles"):
        solve_mixture([], SOME[0])
    with pytest.raises(ValueError, match="different profiles"):
        solve_mixture([SOME[0], SOME[0]], SOME[1])


def test_tracks_are_the_closed_form():
    net = Net()
    kept = PowerEMA(net, lengths=[0.05, 0.2])
    weights = []
    for step, weight in steps(net, 60):
        kept.update(net, step=step)
        weights.append(weight.flatten().numpy())
    for length, track in zip(kept.lengths, kept.tracks, strict=True):
        expected = torch.from_numpy(average(np.stack(weights), length)[-1].reshape(3, 2))
        # Sixty roundings to float32, of 6e-8 each; a step left out would be one in sixty.
        torch.testing.assert_close(track.weight.double(), expected, rtol=1e-6, atol=1e-6)
        assert track.count == 60


def test_the_average_of_constant_weights_is_constant():
    net, other = Net(), Net()
    kept = PowerEMA(other, lengths=[0.1])
    torch.nn.init.normal_(net.weight)
    for step in range(1, 9):
        kept.update(net, step=step)
        assert torch.equal(kept.tracks[0].weight, net.weight), "from the first step on"


def test_tracks_are_neither_in_training_nor_trained():
    kept = PowerEMA(Net(), lengths=[0.05, 0.1]).train()
    assert not any(module.training for module in kept.modules())
    assert not any(parameter.requires_grad for parameter in kept.parameters())
    assert kept.state_dict().keys() == {
        f"tracks.{i}.{name}" for i in range(2) for name in Net().state_dict()
    }


def test_a_length_given_twice_is_refused():
    with pytest.raises(ValueError, match=r"phema.lengths=\[0.1, 0.1\] names a length twice"):
        PowerEMA(Net(), lengths=[0.1, 0.1])
