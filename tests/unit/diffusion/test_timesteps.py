import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logit
from scipy.stats import kstest, norm
from torch.quasirandom import SobolEngine

from ldm.diffusion.rng import make_generators
from ldm.diffusion.timesteps import (
    SPREADS,
    LogitNormalTimestepSampler,
    PowerTimestepSampler,
    Uniforms,
    owen_scramble,
)

LAWS = {
    "uniform": (PowerTimestepSampler, {}, lambda t: t),
    "power": (PowerTimestepSampler, {"power": 3.0}, lambda t: t**3),
    "rare": (PowerTimestepSampler, {"power": 0.5}, lambda t: t**0.5),
    "logit_normal": (
        LogitNormalTimestepSampler,
        {"mean": 0.5, "std": 1.5},
        lambda t: norm.cdf((logit(t) - 0.5) / 1.5),
    ),
}


def draws(positions, seed=0):
    return make_generators(seed, positions, stream="noise")


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("spread", SPREADS)
def test_times_have_the_stated_distribution(law, spread):
    """Over the images of a run, and for one image over the seeds of runs."""
    make, options, cdf = LAWS[law]
    times = make(**options, spread=spread, batch=48)
    many = times(4800, draws(range(4800)))
    assert many.dtype == torch.float64
    assert 0 <= many.min() <= many.max() < 1
    test = kstest(many.numpy(), cdf)
    assert test.pvalue > 0.01
    assert spread == "independent" or test.statistic < 0.005, "evenly spread"
    over_seeds = torch.cat([times(1, draws([77], seed)) for seed in range(2000)])
    assert kstest(over_seeds.numpy(), cdf).pvalue > 0.01


def test_the_distribution_test_detects_a_difference():
    times = LogitNormalTimestepSampler(0.5, 1.6)(20_000, draws(range(20_000)))
    assert kstest(times.numpy(), LAWS["logit_normal"][2]).pvalue < 1e-3


@pytest.mark.parametrize("make", [PowerTimestepSampler, LogitNormalTimestepSampler])
@pytest.mark.parametrize("spread", SPREADS)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_split_of_the_images_has_the_same_times(make, spread, data):
    """Ranks, micro-batches, a resumed run with others: an image's time is its own."""
    times = make(spread=spread, batch=data.draw(st.integers(1, 40)))
    start = data.draw(st.integers(0, 10**9))
    seed = data.draw(st.integers(0, 10**6))
    whole = times(24, draws(range(start, start + 24), seed))
    cuts = sorted(data.draw(st.lists(st.integers(1, 23), max_size=5, unique=True)))
    pieces = zip([0, *cuts], [*cuts, 24], strict=True)
    parts = [times(b - a, draws(range(start + a, start + b), seed)) for a, b in pieces]
    assert torch.equal(whole, torch.cat(parts))
    interleaved = times(12, draws(range(start + 1, start + 24, 2), seed))
    assert torch.equal(whole[1::2], interleaved)


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_stratified_step_has_one_time_in_each_part(batch, step, seed):
    uniforms = Uniforms(spread="stratified", batch=batch)
    drawn = uniforms(batch, draws(range(step * batch, (step + 1) * batch), seed))
    assert sorted((drawn * batch).long().tolist()) == list(range(batch))


def test_strata_are_shuffled_anew_each_step():
    uniforms = Uniforms(spread="stratified", batch=32)
    first, second = (uniforms(32, draws(range(start, start + 32))) for start in (0, 32))
    assert (first * 32).long().tolist() != (second * 32).long().tolist()
    half = torch.stack([uniforms(16, draws(range(s, s + 16))).mean() for s in range(0, 6400, 32)])
    assert abs(half.mean() - 0.5) < 0.02, "a rank has not always the same times"


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10), st.integers(0, 10**6), st.integers(0, 10**6))
def test_sobol_has_one_number_in_each_part_of_an_aligned_block(power, block, seed):
    size = 2**power
    drawn = Uniforms(spread="sobol")(size, draws(range(block * size, (block + 1) * size), seed))
    assert sorted((drawn * size).long().tolist()) == list(range(size))


def test_sobol_matches_torch_up_to_the_scrambling():
    """Its parts of [0, 1) are exchanged, as a tree's branches: so are those of torch's engine."""
    ours = Uniforms(spread="sobol")(256, draws(range(256)))
    theirs = SobolEngine(1).draw(256, dtype=torch.float64)[:, 0]
    torch.testing.assert_close(ours.sort().values, theirs.sort().values, rtol=0, atol=1 / 256)
    for level in (2, 4, 8, 16, 32, 64):
        low = [(256 * u).long() // (256 // level) for u in (ours, van_der_corput(256))]
        partner = dict(zip(low[1].tolist(), low[0].tolist(), strict=True))
        assert [partner[part] for part in low[1].tolist()] == low[0].tolist()
        assert sorted(partner.values()) == list(range(level))


def van_der_corput(n):
    mirrored = [int(f"{i:053b}"[::-1], 2) / 2**53 for i in range(n)]
    return torch.tensor(mirrored, dtype=torch.float64)


def test_scrambling_depends_on_the_seed_and_looks_random():
    """Each image's number over seeds, and the places of neighbours within their parts."""
    first = torch.tensor([owen_scramble(0, key=f"{i}") / 2**53 for i in range(2000)])
    assert kstest(first.numpy(), "uniform").pvalue > 0.01
    drawn = Uniforms(spread="sobol")(4096, draws(range(4096)))
    within = (drawn * 4096) % 1
    assert kstest(within.numpy(), "uniform").pvalue > 0.01
    assert abs(torch.corrcoef(torch.stack([within[:-1], within[1:]]))[0, 1]) < 0.06
    for bit in range(53):  # every bit of the number is turned for half of all seeds
        turned = [owen_scramble(2**45 + 12345, key=f"{i}") >> bit & 1 for i in range(400)]
        assert 140 < sum(turned) < 260


@pytest.mark.parametrize("batch", [16, 24])
@pytest.mark.parametrize("law", LAWS)
def test_spread_times_have_less_variance_in_their_mean(law, batch):
    """What they are for: the mean of a function of t over a batch varies far less."""
    make, options, _ = LAWS[law]

    def variance(spread):
        times = make(**options, spread=spread, batch=batch)
        starts = range(0, 300 * batch, batch)
        means = [times(batch, draws(range(s, s + batch))).exp().mean() for s in starts]
        return torch.stack(means).var()

    independent = variance("independent")
    assert variance("stratified") < independent / 20
    assert variance("sobol") < independent / (20 if batch == 16 else 5)


def test_steps_of_a_sobol_run_complement_one_another():
    """Over 64 steps of 16 the mean is far steadier than that of as many stratified steps."""

    def error(spread):
        times = PowerTimestepSampler(spread=spread, batch=16)
        means = [times(1024, draws(range(1024), seed)).mean() for seed in range(20)]
        return (torch.stack(means) - 0.5).square().mean()

    assert error("sobol") < error("stratified") / 100
    assert error("stratified") < error("independent") / 20


def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match=r"time_power must be above 0, got 0\.0"):
        PowerTimestepSampler(0.0)
    with pytest.raises(ValueError, match=r"timestep_sampler\.std must be above 0"):
        LogitNormalTimestepSampler(std=0.0)
    with pytest.raises(ValueError, match="'halton' is none of independent, stratified, sobol"):
        PowerTimestepSampler(spread="halton")
    with pytest.raises(ValueError, match="images of an optimizer step"):
        PowerTimestepSampler(spread="stratified")
    for spread in ("stratified", "sobol"):
        with pytest.raises(ValueError, match="needs to know which images"):
            PowerTimestepSampler(spread=spread, batch=4)(4, torch.Generator())
        with pytest.raises(ValueError, match="3 generators for a batch of 4"):
            PowerTimestepSampler(spread=spread, batch=4)(4, draws(range(3)))


@pytest.mark.parametrize("spread", SPREADS)
def test_timesteps_are_drawn_on_the_host(spread):
    """Whatever the device of the other numbers; `meta` has no numbers at all."""
    sampler = PowerTimestepSampler(spread=spread, batch=2)
    here, there = (make_generators(0, [4, 5], stream="a", device=at) for at in ("cpu", "meta"))
    assert torch.equal(sampler(2, there), sampler(2, here))
