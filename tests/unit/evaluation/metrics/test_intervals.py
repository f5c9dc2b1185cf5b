"""Intervals hold the truth as often as they say, and follow from their seed alone."""

import numpy as np
import pytest
import scipy.stats
import torch
from gaussians import gaussian_rows

from ldm.evaluation.metrics.frechet import frechet_distance, frechet_estimate
from ldm.evaluation.metrics.intervals import Estimate, bootstrap_mean, jackknife, wilson_interval
from ldm.evaluation.metrics.moments import Moments
from ldm.evaluation.metrics.precision_recall import Manifold


def one_by_one(statistic):
    """A statistic of the rows alone, computed for all rows and without each group."""

    def numbers(rows, groups):
        kept = [[i for i in range(len(rows)) if i not in set(group.tolist())] for group in groups]
        return [statistic(rows), *(statistic(rows[places]) for places in kept)]

    return numbers


def normal(n, seed):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def test_the_bootstrap_is_scipys():
    values = normal(200, seed=0).exp()
    found = bootstrap_mean(values, seed=1, level=0.9)
    scipys = scipy.stats.bootstrap(
        (values.numpy(),), np.mean, method="percentile", confidence_level=0.9, rng=0
    ).confidence_interval
    error = float(values.std()) / 200**0.5
    assert found == pytest.approx(tuple(scipys), abs=0.1 * error)
    assert found == bootstrap_mean(values, seed=1, level=0.9)
    assert found != bootstrap_mean(values, seed=2, level=0.9)


def test_the_bootstrap_holds_the_mean_as_often_as_it_says():
    inside = [
        low < 0 < high
        for low, high in (
            bootstrap_mean(normal(50, seed), seed=seed, resamples=300, level=0.8)
            for seed in range(200)
        )
    ]
    assert np.mean(inside) == pytest.approx(0.8, abs=0.1)


@pytest.mark.parametrize("count", [1, 12, 150, 1000])
def test_wilsons_interval_is_scipys(count):
    for right in {0, 1, count // 3, count - 1, count}:
        scipys = scipy.stats.binomtest(right, count).proportion_ci(method="wilson")
        assert wilson_interval(right / count, count) == pytest.approx(tuple(scipys), abs=1e-12)
    low, high = wilson_interval(1.0, count, level=0.9)
    assert low == pytest.approx(1 / (1 + scipy.stats.norm.ppf(0.95) ** 2 / count))
    assert high == 1
    for share, of in ((1.1, count), (0.5, 0)):
        with pytest.raises(ValueError, match="no share"):
            wilson_interval(share, of)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.95, 0.98, 0.99, 0.995])
@pytest.mark.parametrize("count", [150, 500, 2000])
def test_wilsons_interval_holds_shares_near_1(share, count):
    """By the exact chances of each count; single pairs lie a little off, as counts are whole."""
    right = np.arange(count + 1)
    ends = np.array([wilson_interval(k / count, count) for k in right])
    inside = (ends[:, 0] <= share) & (share <= ends[:, 1])
    chance = scipy.stats.binom.pmf(right, count, share)
    assert 0.925 < chance[inside].sum() < 0.99


def test_dependent_shares_have_the_interval_of_their_error():
    error = (0.2 * 0.8 / 50) ** 0.5  # that of 50 independent values
    assert Estimate(0.2, error).share_interval(400) == pytest.approx(wilson_interval(0.2, 50))
    assert Estimate(0.2, 1e-4).share_interval(400) == pytest.approx(wilson_interval(0.2, 400))
    assert Estimate(1.0, 0.0).share_interval(400) == pytest.approx(wilson_interval(1.0, 400))
    assert Estimate(0.2, error, 19).share_interval(400).high > wilson_interval(0.2, 50).high


@pytest.mark.parametrize("n", [200, 213])  # 13 rows are in no group
def test_the_jackknife_of_a_mean_is_its_error(n):
    def statistic(rows):
        return {"mean": float(rows.mean()), "double": 2 * float(rows.mean())}

    ratios = []
    for seed in range(100):
        found = jackknife(one_by_one(statistic), normal(n, seed), seed=seed)
        assert found["mean"].value == pytest.approx(float(normal(n, seed).mean()))
        assert found["double"].error == pytest.approx(2 * found["mean"].error)
        ratios.append(found["mean"].error * n**0.5)
    assert np.sqrt(np.mean(np.square(ratios))) == pytest.approx(1, abs=0.05)


def test_with_a_row_a_group_it_is_the_error_exactly():
    values = normal(30, seed=0).double()
    found = jackknife(
        one_by_one(lambda rows: {"mean": float(rows.mean())}), values, seed=0, groups=30
    )
    assert found["mean"].error == pytest.approx(float(values.std()) / 30**0.5, rel=1e-9)


def test_student_widens_what_few_groups_know():
    for freedom, off in ((9, 0.02), (19, 0.005), (100, 0.001)):
        t = Estimate(0.0, 1.0, freedom).interval(level=0.95).high
        assert t == pytest.approx(scipy.stats.t.ppf(0.975, freedom), rel=off)
    assert Estimate(3.0, 2.0).interval() == pytest.approx((3 - 3.919928, 3 + 3.919928))


def test_the_jackknife_of_recall_and_coverage_is_the_deviation_between_draws():
    real = Manifold(gaussian_rows(400, 16, seed=1))
    draws = [gaussian_rows(150, 16, seed=seed, spread=0.8) for seed in range(2, 62)]
    found = [real.compare(rows) for rows in draws]
    errors = [jackknife(real.compare_without, rows, seed=0) for rows in draws[:10]]
    for name in ("precision", "recall", "density", "coverage"):
        deviation = np.std([one[name] for one in found], ddof=1)
        told = np.mean([one[name].error for one in errors])
        assert 0.7 < told / deviation < 1.8, name


@pytest.mark.parametrize("n", [150, 167])
def test_the_jackknife_of_the_manifold_is_that_of_one_comparison_a_group(n):
    real = Manifold(gaussian_rows(300, 16, seed=1))
    rows = gaussian_rows(n, 16, seed=2, spread=0.9)
    found = jackknife(real.compare_without, rows, seed=3)
    expected = jackknife(one_by_one(real.compare), rows, seed=3)
    for name, estimate in expected.items():
        assert found[name] == pytest.approx(estimate, rel=1e-12), name


def test_drawing_with_replacement_raises_the_distance_where_the_jackknife_does_not():
    reference = Moments.of(gaussian_rows(2000, 32, seed=1))
    rows = gaussian_rows(100, 32, seed=2)
    found = frechet_estimate(reference, rows)
    generator = torch.Generator().manual_seed(0)
    drawn = [
        frechet_distance(
            reference, Moments.of(rows[torch.randint(100, (100,), generator=generator)])
        )
        for _ in range(20)
    ]
    assert min(drawn) > found.interval(level=0.999).high  # none comes near the value itself
    left = jackknife(
        one_by_one(lambda part: {"fd": frechet_estimate(reference, part).value}), rows, seed=0
    )
    assert left["fd"].value == found.value
    assert 0.5 < left["fd"].error / found.error < 2


def test_nonsense_is_refused():
    for values in (torch.ones(1), torch.ones(3, 2), torch.tensor([1.0, float("nan")])):
        with pytest.raises(ValueError, match="two finite numbers"):
            bootstrap_mean(values, seed=0)
    with pytest.raises(ValueError, match="level"):
        bootstrap_mean(torch.arange(3.0), seed=0, level=95)
    with pytest.raises(ValueError, match="20 groups of 10 rows"):
        jackknife(lambda rows, groups: [{}], torch.ones(10), seed=0)
