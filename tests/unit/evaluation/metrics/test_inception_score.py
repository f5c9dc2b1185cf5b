"""The inception score against torchmetrics, and where it is known."""

import pytest
import torch
from torch import nn
from torchmetrics.image.inception import InceptionScore

from ldm.evaluation.metrics.inception_score import inception_score


class Logits(nn.Module):
    """Pictures that are their own logits."""

    def forward(self, rows):
        return rows


@pytest.mark.parametrize(("n", "splits"), [(100, 10), (95, 10), (40, 1)])
def test_it_is_torchmetrics_on_the_same_splits(n, splits):
    logits = 3 * torch.randn(n, 12, generator=torch.Generator().manual_seed(0)).double()
    metric = InceptionScore(Logits(), splits=splits)
    metric.update(logits)
    torch.manual_seed(5)
    mean = float(metric.compute()[0])
    found = inception_score(logits.softmax(dim=1), seed=5, splits=splits)
    assert found == pytest.approx(mean, rel=1e-9)


def test_it_is_the_number_of_classes_at_best_and_one_at_worst():
    certain = torch.eye(8).repeat(10, 1)
    assert inception_score(certain, seed=0, splits=1) == pytest.approx(8)
    assert inception_score(certain[:1].expand(80, -1), seed=0) == pytest.approx(1)
    assert inception_score(torch.full((80, 8), 1 / 8), seed=0) == pytest.approx(1)


def test_logits_and_too_few_pictures_are_refused():
    with pytest.raises(ValueError, match="softmax"):
        inception_score(torch.randn(40, 8), seed=0)
    with pytest.raises(ValueError, match="evaluate 20 or lower splits"):
        inception_score(torch.eye(8), seed=0)
    with pytest.raises(ValueError, match=r"\(n, classes\)"):
        inception_score(torch.ones(40), seed=0)
