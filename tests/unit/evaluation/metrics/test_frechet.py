"""The Frechet distance against torchmetrics, SciPy's square root and closed forms."""

import numpy as np
import pytest
import scipy.linalg
import torch
from gaussians import gaussian_rows
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from ldm.evaluation.metrics.frechet import frechet_distance, frechet_estimate
from ldm.evaluation.metrics.moments import Moments


class Rows(nn.Module):
    """Pictures that are their own features."""

    def __init__(self, width):
        super().__init__()
        self.num_features = width

    def forward(self, rows):
        return rows


def torchmetrics_fid(real, generated, *, offset=0.0):
    """Of rows brought back to zero: far from it, torchmetrics' sums of x x^T lose digits."""
    real, generated = real - offset, generated - offset
    metric = FrechetInceptionDistance(Rows(real.shape[1]), normalize=True)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return float(metric.compute())


def two_pass(real, generated):
    """The textbook's formula, with SciPy's matrix square root."""
    (mean_a, mean_b), (a, b) = zip(
        *((x.mean(0), np.cov(x, rowvar=False)) for x in (real.numpy(), generated.numpy())),
        strict=True,
    )
    root = scipy.linalg.sqrtm(a @ b)
    return np.sum((mean_a - mean_b) ** 2) + np.trace(a + b) - 2 * np.trace(root).real


def by_singular_values(real, generated):
    """Without any covariance: tr (AB)^1/2 is the sum of singular values of X Y^T, centred."""
    (x, mean_a), (y, mean_b) = (
        ((rows - rows.mean(0)) / (len(rows) - 1) ** 0.5, rows.mean(0)) for rows in (real, generated)
    )
    overlap = torch.linalg.svdvals(x @ y.T).sum()
    apart = (mean_a - mean_b).square().sum()
    return float(apart + x.square().sum() + y.square().sum() - 2 * overlap)


def ours(real, generated):
    """By moments and by rows, which are to agree."""
    distance = frechet_distance(Moments.of(real), Moments.of(generated))
    estimate = frechet_estimate(Moments.of(real), generated)
    assert estimate.value == pytest.approx(distance, rel=1e-5, abs=1e-9)
    return distance


def pair(n, width, *, offset=0.0, real=None):
    return (
        gaussian_rows(real or n, width, seed=1, offset=offset),
        gaussian_rows(n, width, seed=2, shift=0.3, spread=1.1, offset=offset),
    )


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize(("n", "real"), [(300, 400), (30, 400), (300, 30), (30, 30)])
def test_it_is_what_others_compute(n, real, offset):
    rows = pair(n, 64, offset=offset, real=real)
    distance = ours(*rows)
    assert distance == pytest.approx(by_singular_values(*rows), rel=1e-6)
    assert distance == pytest.approx(torchmetrics_fid(*rows, offset=offset), rel=1e-4)
    if min(n, real) > 64:  # SciPy does not promise a square root of a singular matrix
        assert distance == pytest.approx(two_pass(*rows), rel=1e-6)


@pytest.mark.slow
def test_it_is_what_others_compute_at_full_width_of_few_pictures():
    offset = 1e4
    rows = pair(500, 2048, offset=offset)
    distance = ours(*rows)
    assert distance == pytest.approx(by_singular_values(*rows), rel=1e-6)
    assert distance == pytest.approx(torchmetrics_fid(*rows, offset=offset), rel=1e-4)
    assert distance == pytest.approx(two_pass(*rows), rel=1e-4)


def known(mean, covariance, count=1000):
    scatter = torch.tensor(covariance, dtype=torch.float64) * (count - 1)
    return Moments(count, torch.tensor(mean, dtype=torch.float64), scatter)


def test_it_is_the_closed_form_of_two_gaussians():
    a = known([1.0, 2.0], [[2.0, 0.5], [0.5, 1.0]])
    b = known([0.0, 4.0], [[1.0, -0.3], [-0.3, 3.0]])
    product = np.array([[2.0, 0.5], [0.5, 1.0]]) @ np.array([[1.0, -0.3], [-0.3, 3.0]])
    # The root of a 2 x 2 matrix has the trace (tr M + 2 det(M)^1/2)^1/2.
    overlap = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + 3 + 4 - 2 * overlap, rel=1e-12)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-12)
    # Diagonal ones: |m|^2 plus the squared differences of deviations.
    a, b = known([0.0, 0.0], [[4.0, 0.0], [0.0, 0.0]]), known([3.0, 0.0], [[9.0, 0.0], [0.0, 1.0]])
    assert frechet_distance(a, b) == pytest.approx(9 + 1 + 1, rel=1e-7)


@pytest.mark.parametrize("n", [40, 300])
def test_a_set_is_at_no_distance_from_itself(n):
    rows = gaussian_rows(n, 128, seed=0, offset=100)
    rows[:, 5] = 7  # a dead feature
    size = float(rows.var(dim=0).sum())
    assert frechet_distance(Moments.of(rows), Moments.of(rows)) < 1e-6 * size
    estimate = frechet_estimate(Moments.of(rows), rows)
    assert estimate.value < 1e-6 * size
    assert estimate.error < 1e-6 * size


def test_it_grows_with_a_shift_and_with_a_spread():
    reference = Moments.of(gaussian_rows(500, 32, seed=1))
    for change in ("shift", "spread"):
        generated = [
            gaussian_rows(500, 32, seed=2, **{change: (change == "spread") + strength})
            for strength in (0.0, 0.25, 0.5, 1.0)
        ]
        distances = [frechet_distance(reference, Moments.of(rows)) for rows in generated]
        assert distances == sorted(distances)
        assert distances[-1] > 5 * distances[0]


def test_identical_pictures_have_a_distance_all_the_same():
    reference = Moments.of(gaussian_rows(100, 16, seed=1))
    for n in (5, 50):
        collapsed = torch.ones(n, 16)
        expected = (1 - reference.mean).square().sum() + reference.covariance().trace()
        estimate = frechet_estimate(reference, collapsed)
        assert estimate.value == pytest.approx(float(expected), rel=1e-9)
        assert estimate.error == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("n", "width"), [(300, 16), (300, 8), (60, 64)])
def test_the_error_is_what_leaving_out_one_row_at_a_time_says(n, width):
    reference = Moments.of(gaussian_rows(2000, width, seed=1))
    rows = gaussian_rows(n, width, seed=2, shift=0.5)
    left = [frechet_estimate(reference, torch.cat([rows[:i], rows[i + 1 :]])) for i in range(n)]
    values = torch.tensor([one.value for one in left], dtype=torch.float64)
    jackknife = float((n - 1) / n**0.5 * values.std())
    # Leaving out one is a finite step: where n is not far above D it is a little longer.
    assert frechet_estimate(reference, rows).error == pytest.approx(jackknife, rel=0.15)


def test_the_error_is_the_deviation_between_draws():
    reference = Moments.of(gaussian_rows(2000, 16, seed=1))
    draws = [
        frechet_estimate(reference, gaussian_rows(300, 16, seed=seed, shift=0.5))
        for seed in range(2, 202)
    ]
    values, errors, _ = torch.tensor(draws, dtype=torch.float64).unbind(1)
    assert float(errors.mean() / values.std()) == pytest.approx(1, abs=0.15)
    centre = float(values.mean())
    inside = [low < centre < high for low, high in (draw.interval() for draw in draws)]
    assert 0.88 < np.mean(inside) < 0.99


def test_the_rows_are_not_touched():
    rows = gaussian_rows(20, 8, seed=0)
    kept = rows.clone()
    frechet_estimate(Moments.of(rows), rows)
    assert torch.equal(rows, kept)


def test_one_picture_or_another_network_is_refused():
    reference = Moments.of(gaussian_rows(20, 8, seed=0))
    one = gaussian_rows(1, 8, seed=0)
    with pytest.raises(ValueError, match="evaluate more images"):
        frechet_distance(reference, Moments.of(one))
    with pytest.raises(ValueError, match="evaluate more images"):
        frechet_distance(Moments.of(one), reference)
    with pytest.raises(ValueError, match="evaluate more images"):
        frechet_estimate(reference, one)
    other = gaussian_rows(20, 9, seed=0)
    with pytest.raises(ValueError, match="same feature network"):
        frechet_distance(reference, Moments.of(other))
    with pytest.raises(ValueError, match="same feature network"):
        frechet_estimate(reference, other)
