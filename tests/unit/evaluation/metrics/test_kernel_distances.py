"""KID against torchmetrics on the same subsets, CMMD against its formula, errors against draws."""

import pytest
import torch
from gaussians import gaussian_rows
from torch import nn
from torchmetrics.image.kid import KernelInceptionDistance

from ldm.evaluation.metrics import kernel_distances
from ldm.evaluation.metrics.kernel_distances import KernelDistances


class Rows(nn.Module):
    """Pictures that are their own features."""

    num_features = 32

    def forward(self, rows):
        return rows


@pytest.fixture
def real():
    return gaussian_rows(300, 32, seed=1, offset=0.5)


@pytest.fixture
def generated():
    return gaussian_rows(200, 32, seed=2, shift=0.3, offset=0.5)


@pytest.mark.parametrize("subset_size", [50, 200])
def test_kid_is_torchmetrics_on_the_same_subsets(real, generated, subset_size):
    metric = KernelInceptionDistance(Rows(), subsets=20, subset_size=subset_size, normalize=True)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    torch.manual_seed(7)
    mean, std = (float(number) for number in metric.compute())
    found = KernelDistances(real).kid(generated, seed=7, subsets=20, subset_size=subset_size)
    assert found.value == pytest.approx(mean, rel=1e-9)
    assert found == KernelDistances(real).kid(
        generated, seed=7, subsets=20, subset_size=subset_size
    )
    other = KernelDistances(real).kid(generated, seed=8, subsets=20, subset_size=subset_size)
    assert other.value != found.value
    assert other.value == pytest.approx(mean, abs=4 * std / 20**0.5)


def test_kid_is_the_same_whatever_the_blocks_and_however_the_real_pairs_are_summed(
    real, generated, monkeypatch
):
    """Small subsets are summed one by one; of large ones, all pairs are computed once."""
    settings = {"seed": 0, "subsets": 20}
    for size in (30, 150):
        expected = KernelDistances(real).kid(generated, subset_size=size, **settings)
        with monkeypatch.context() as patch:
            patch.setattr(kernel_distances, "_KERNEL_PAIRS_PER_BLOCK", 5000)
            kernels = KernelDistances(real)
            for _ in range(2):  # the second time from what was kept
                found = kernels.kid(generated, subset_size=size, **settings)
                assert found == pytest.approx(expected, rel=1e-9)


def test_kid_in_single_precision_is_kid(real, generated):
    single = KernelDistances(real.float()).kid(
        generated.float(), seed=0, subsets=5, subset_size=100
    )
    assert single.value == pytest.approx(
        KernelDistances(real).kid(generated, seed=0, subsets=5, subset_size=100).value, rel=1e-4
    )


def squared_distances(a, b):
    return (a[:, None] - b[None]).square().sum(dim=2)


def plain_cmmd(real, generated):
    """The formula of the paper's code, term by term, on embeddings of length 1."""
    x, y = (side / side.norm(dim=1, keepdim=True) for side in (real, generated))
    xx, yy, xy = (
        torch.exp(-squared_distances(a, b) / (2 * 10**2)).mean()
        for a, b in ((x, x), (y, y), (x, y))
    )
    return float(1000 * (xx + yy - 2 * xy))


def test_cmmd_is_its_formula_whatever_the_blocks(real, generated, monkeypatch):
    expected = plain_cmmd(real, generated)
    assert expected > 0.01
    assert KernelDistances(real).cmmd(generated).value == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(
        kernel_distances, "_KERNEL_PAIRS_PER_BLOCK", 1000
    )  # blocks of three to five rows
    assert KernelDistances(real).cmmd(generated).value == pytest.approx(expected, rel=1e-9)
    assert KernelDistances(3 * real).cmmd(0.2 * generated).value == pytest.approx(
        expected, rel=1e-9
    )


def test_a_set_is_at_no_cmmd_from_itself(real):
    assert KernelDistances(real).cmmd(real.clone()).value == pytest.approx(0, abs=1e-9)


def test_both_grow_with_a_shift(real):
    for metric in (
        lambda rows: KernelDistances(real).kid(rows, seed=0, subsets=10, subset_size=100).value,
        lambda rows: KernelDistances(real).cmmd(rows).value,
    ):
        values = [
            metric(gaussian_rows(300, 32, seed=2, shift=shift, offset=0.5))
            for shift in (0.0, 0.5, 1.0, 2.0)
        ]
        assert values == sorted(values)
        assert values[-1] > 5 * values[0]


def test_errors_are_the_deviations_between_draws(real):
    draws = [gaussian_rows(200, 32, seed=seed, shift=0.4, offset=0.5) for seed in range(2, 82)]
    for found in (
        [KernelDistances(real).kid(rows, seed=0, subsets=20, subset_size=100) for rows in draws],
        [KernelDistances(real).cmmd(rows) for rows in draws],
    ):
        values = torch.tensor([one[0] for one in found], dtype=torch.float64)
        errors = torch.tensor([one.error for one in found], dtype=torch.float64)
        assert float(errors.mean() / values.std()) == pytest.approx(1.05, abs=0.25)


def test_bad_sides_are_refused(real, generated):
    with pytest.raises(ValueError, match="set subset_size between 2 and 200"):
        KernelDistances(real).kid(generated, seed=0)
    with pytest.raises(ValueError, match="of one network"):
        KernelDistances(real).cmmd(generated[:, :5])
    with pytest.raises(ValueError, match="two rows or more"):
        KernelDistances(real[:1]).cmmd(generated)
    with pytest.raises(ValueError, match="no direction"):
        KernelDistances(real).cmmd(torch.cat([generated, torch.zeros(1, 32)]))
