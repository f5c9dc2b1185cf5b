"""Moments of rows in any batches and any order are those of all rows at once."""

from functools import reduce
from operator import add

import numpy as np
import pytest
import torch
from gaussians import gaussian_rows
from hypothesis import given
from hypothesis import strategies as st

from ldm.evaluation.metrics.moments import Moments


def same(moments, other, tolerance):
    assert moments.count == other.count
    torch.testing.assert_close(moments.mean, other.mean, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(moments.scatter, other.scatter, rtol=tolerance, atol=tolerance)


@given(
    ends=st.lists(st.integers(0, 40), max_size=6),
    seed=st.integers(0, 2**16),
    offset=st.sampled_from([0.0, 1e4]),
)
def test_parts_add_up_to_the_whole(ends, seed, offset):
    rows = gaussian_rows(40, 5, seed=seed, offset=offset)
    whole = Moments.of(rows)
    parts = rows.tensor_split(sorted(ends))  # some of them empty
    streamed = Moments(5)
    for part in parts:
        streamed.add(part)
    tolerance = 1e-9 if offset else 1e-12
    same(streamed, whole, tolerance)
    same(reduce(add, [Moments.of(part) for part in parts]), whole, tolerance)


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
def test_covariance_far_from_zero_is_that_of_two_passes(offset):
    rows = gaussian_rows(100, 256, seed=1, offset=offset)
    streamed = Moments(256)
    for part in rows.split(7):
        streamed.add(part)
    assert streamed.mean.numpy() == pytest.approx(rows.numpy().mean(0), rel=1e-12)
    expected = np.cov(rows.numpy(), rowvar=False)
    assert np.abs(streamed.covariance().numpy() - expected).max() < 1e-16 * max(offset, 10) * 10


def test_the_root_squares_to_the_covariance_and_follows_new_rows():
    rows = gaussian_rows(60, 16, seed=0)
    moments = Moments.of(rows[:9])
    for more in (rows[9:9], rows[9:]):
        moments.add(more)
        root = moments.root()
        assert root.shape == (16, min(16, moments.count - 1))
        torch.testing.assert_close(root @ root.T, moments.covariance())
    assert moments.root() is root


def test_adding_moments_leaves_them_alone():
    a, b = Moments.of(gaussian_rows(10, 4, seed=0)), Moments.of(gaussian_rows(5, 4, seed=1))
    kept = [a.count, a.mean.clone(), a.scatter.clone()]
    (a + b).add(gaussian_rows(3, 4, seed=2))
    assert a.count == kept[0]
    assert torch.equal(a.mean, kept[1])
    assert torch.equal(a.scatter, kept[2])


@pytest.mark.parametrize(
    ("features", "told"),
    [
        (torch.zeros(4, 3, 2), r"\(n, D\)"),
        (torch.zeros(4, 3, dtype=torch.int64), "floating"),
        (torch.zeros(4, 3, dtype=torch.bfloat16), "outside autocast"),
        (torch.zeros(4, 3).half(), "outside autocast"),
        (torch.tensor([[1.0, 2, 3], [1, float("nan"), 3]]), "1 of 2 feature rows"),
        (torch.tensor([[1.0, float("inf"), 3]]), "1 of 1 feature rows"),
        (torch.zeros(4, 5), "5 features do not go with 3"),
    ],
)
def test_bad_features_are_refused(features, told):
    moments = Moments(3)
    with pytest.raises(ValueError, match=told):
        moments.add(features)
    assert moments.count == 0


def test_one_row_has_no_covariance_and_other_widths_do_not_add():
    with pytest.raises(ValueError, match="evaluate more images"):
        Moments.of(torch.ones(1, 3)).covariance()
    with pytest.raises(ValueError, match="do not go with"):
        Moments(3) + Moments(4)
