"""The mean and covariance of feature rows, and the rows that are refused."""

import numpy as np
import pytest
import torch
from gaussians import gaussian_rows

from ldm.evaluation.metrics.moments import Moments


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
def test_covariance_far_from_zero_is_that_of_two_passes(offset):
    rows = gaussian_rows(100, 256, seed=1, offset=offset)
    moments = Moments.of(rows)
    assert moments.mean.numpy() == pytest.approx(rows.numpy().mean(0), rel=1e-12)
    expected = np.cov(rows.numpy(), rowvar=False)
    assert np.abs(moments.covariance().numpy() - expected).max() < 1e-16 * max(offset, 10) * 10


@pytest.mark.parametrize("count", [9, 60])
def test_the_root_squares_to_the_covariance(count):
    moments = Moments.of(gaussian_rows(count, 16, seed=0))
    root = moments.root
    assert root.shape == (16, min(16, count - 1))
    torch.testing.assert_close(root @ root.T, moments.covariance())
    assert moments.root is root, "computed once"


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(4, 3, 2), r"\(n, D\)"),
        (torch.zeros(4, 3, dtype=torch.int64), "floating"),
        (torch.zeros(4, 3, dtype=torch.bfloat16), "outside autocast"),
        (torch.zeros(4, 3).half(), "outside autocast"),
        (torch.tensor([[1.0, 2, 3], [1, float("nan"), 3]]), "1 of 2 feature rows"),
        (torch.tensor([[1.0, float("inf"), 3]]), "1 of 1 feature rows"),
    ],
)
def test_bad_features_are_refused(features, message):
    with pytest.raises(ValueError, match=message):
        Moments.of(features)


def test_one_row_has_no_covariance():
    with pytest.raises(ValueError, match="evaluate more images"):
        Moments.of(torch.ones(1, 3)).covariance()
