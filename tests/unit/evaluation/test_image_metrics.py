"""Metrics of a user's own: what they get, and what they may return."""

import pytest
import torch
import torchmetrics

from ldm.evaluation.image_metrics import ImageMetrics

IMAGES = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)


class Seen:
    """Remembers its arguments."""

    def __init__(self, value=1.0):
        self.value, self.calls = value, []

    def update(self, images, captions, real):
        self.calls.append((len(images), captions, real))

    def compute(self):
        return self.value

    def reset(self):
        self.calls.clear()


class Level(torchmetrics.MeanMetric):
    """A class of torchmetrics, which takes images alone."""

    def update(self, images):
        super().update(images.float())


def test_a_metric_gets_the_arguments_that_it_names():
    seen, level = Seen(), Level()
    metrics = ImageMetrics({"seen": seen, "level": level})
    metrics.reset(torch.device("cpu"))
    assert metrics.needs_real_images
    metrics.update(IMAGES // 2, ("a", "b"), real=True)
    metrics.update(IMAGES, ("c", "d"), real=False)
    assert seen.calls == [(2, ["a", "b"], True), (2, ["c", "d"], False)]
    assert metrics.compute() == {"seen": 1.0, "level": pytest.approx(float(IMAGES.float().mean()))}


def test_several_values_have_the_name_before_their_keys():
    metrics = ImageMetrics({"mine": Seen({"low": torch.tensor(0.5), "high": 2})})
    assert metrics.compute() == {"mine_low": 0.5, "mine_high": 2.0}


@pytest.mark.parametrize("value", [None, (1.0, 2.0), torch.ones(2), {"a": "text"}])
def test_anything_but_numbers_is_refused_by_the_name_of_the_metric(value):
    with pytest.raises(ValueError, match=r"metrics\.mine: compute\(\) returns"):
        ImageMetrics({"mine": Seen(value)}).compute()
