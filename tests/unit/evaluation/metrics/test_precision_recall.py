"""Precision, recall, density and coverage against all distances, written out."""

import numpy as np
import pytest
import torch
from gaussians import gaussian_rows

from ldm.evaluation.metrics import precision_recall
from ldm.evaluation.metrics.precision_recall import Manifold


def brute_force(real, generated):
    """Every distance from differences, every ball one by one."""
    x, y = real.double().numpy(), generated.double().numpy()

    def distances(a, b):
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(axis=2))

    def radii(a, k):
        return np.sort(distances(a, a), axis=1)[:, k]  # place 0 is the row itself

    between = distances(x, y)
    small, large, own = radii(x, 3), radii(x, 5), radii(y, 3)
    n, m = between.shape
    return {
        "precision": np.mean([any(between[i, j] <= small[i] for i in range(n)) for j in range(m)]),
        "recall": np.mean([any(between[i, j] <= own[j] for j in range(m)) for i in range(n)]),
        "density": sum(between[i, j] < large[i] for i in range(n) for j in range(m)) / (5 * m),
        "coverage": np.mean([min(between[i]) < large[i] for i in range(n)]),
    }


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m"), [(120, 80), (50, 130)])
def test_all_four_are_those_of_all_distances(n, m, dtype, offset, monkeypatch):
    real = gaussian_rows(n, 24, seed=1, offset=offset).to(dtype)
    generated = gaussian_rows(m, 24, seed=2, shift=1.5, spread=1.2, offset=offset).to(dtype)
    expected = brute_force(real, generated)
    assert all(0.01 < value < 0.99 for value in expected.values())
    assert Manifold(real).compare(generated) == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(
        precision_recall, "_DISTANCES_PER_BLOCK", 700
    )  # blocks of five to fourteen rows
    assert Manifold(real).compare(generated) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_copies_of_real_pictures_lie_on_borders_not_across_them(offset):
    real = gaussian_rows(60, 24, seed=1).float() + offset
    copies = torch.cat([real[:40], real[:10], gaussian_rows(20, 24, seed=2).float() + offset])
    assert Manifold(real).compare(copies) == pytest.approx(brute_force(real, copies), rel=1e-12)
    # A row's fifth neighbour is on the border, and out; with the row itself that leaves five.
    found = Manifold(real).compare(real.clone())
    assert found == {"precision": 1, "recall": 1, "density": 1, "coverage": 1}
    grid = torch.randint(3, (80, 4), generator=torch.Generator().manual_seed(0)).float() + offset
    assert Manifold(grid[:50]).compare(grid[50:]) == pytest.approx(
        brute_force(grid[:50], grid[50:]), rel=1e-12
    )


def test_known_directions():
    real = Manifold(gaussian_rows(400, 16, seed=1))
    same = real.compare(gaussian_rows(400, 16, seed=2))
    assert same["density"] == pytest.approx(1, abs=0.15)
    assert same["coverage"] > 0.9

    far = real.compare(gaussian_rows(400, 16, seed=2, shift=20))
    assert far == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}

    narrow = real.compare(gaussian_rows(400, 16, seed=2, spread=0.3))  # tame pictures
    assert narrow["precision"] > same["precision"]
    assert narrow["density"] > same["density"]
    assert narrow["recall"] < same["recall"] - 0.3
    assert narrow["coverage"] < same["coverage"] - 0.15

    collapsed = real.compare(gaussian_rows(1, 16, seed=2, spread=0.1).expand(400, -1))
    assert collapsed["precision"] == 1
    assert collapsed["recall"] == 0
    assert collapsed["coverage"] < 0.3


def test_too_few_rows_and_another_network_are_refused():
    rows = gaussian_rows(6, 8, seed=0)
    with pytest.raises(ValueError, match="evaluate 6 or more"):
        Manifold(rows[:5])
    real = Manifold(rows)
    with pytest.raises(ValueError, match="evaluate 4 or more"):
        real.compare(rows[:3])
    with pytest.raises(ValueError, match="same feature network"):
        real.compare(rows[:, :4])


def test_without_groups_of_rows_all_four_are_those_of_the_rest(monkeypatch):
    real, rows = gaussian_rows(120, 24, seed=1), gaussian_rows(80, 24, seed=2, shift=1.0)
    groups = torch.randperm(80, generator=torch.Generator().manual_seed(0))[:60].split(12)
    expected = [brute_force(real, rows)]
    for group in groups:
        rest = [i for i in range(80) if i not in group.tolist()]
        expected.append(brute_force(real, rows[rest]))
    assert len({tuple(each.values()) for each in expected}) == 6
    for block in (precision_recall._DISTANCES_PER_BLOCK, 700):
        monkeypatch.setattr(precision_recall, "_DISTANCES_PER_BLOCK", block)
        for found, each in zip(Manifold(real).compare_without(rows, groups), expected, strict=True):
            assert found == pytest.approx(each, rel=1e-12)
