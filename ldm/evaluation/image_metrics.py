"""Metrics of a user's own, in torchmetrics' convention: update, compute, reset.

Shapes: n images of a batch, S side of the square image.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class ImageMetric(Protocol):
    """A metric of images; only the first process calls it, with all images in a fixed order.

    `update` may leave `captions` or `real` out of its arguments. With `real`, it first gets the
    real images to compare with, and their captions.
    """

    def update(self, images: Tensor, captions: list[str], real: bool) -> None:
        """Adds a batch of images (n, 3, S, S), uint8, on the device of the evaluation."""

    def compute(self) -> float | Tensor | Mapping[str, float | Tensor]:
        """Returns the value, or several by name."""

    def reset(self) -> None:
        """Forgets all images, also the real ones."""


class ImageMetrics:
    """Several metrics of images, by name."""

    def __init__(self, metrics: Mapping[str, ImageMetric]) -> None:
        self.metrics = metrics
        self.arguments = {name: _list_arguments(metric) for name, metric in metrics.items()}
        networks = [metric for metric in metrics.values() if isinstance(metric, nn.Module)]
        if networks:
            from torchmetrics import Metric  # slow to import, and most runs have no such metric
        for part in (part for network in networks for part in network.modules()):
            if isinstance(part, Metric):  # the other processes compute nothing
                part.distributed_available_fn = lambda: False

    @property
    def names(self) -> list[str]:
        """The names of the metrics, sorted."""
        return sorted(self.metrics)

    @property
    def needs_real_images(self) -> bool:
        """Returns whether a metric compares with real images."""
        return any("real" in arguments for arguments in self.arguments.values())

    def reset(self, device: torch.device) -> None:
        """Begins a measurement; networks of metrics move to the device."""
        for metric in self.metrics.values():
            if isinstance(metric, nn.Module):
                metric.to(device)
            metric.reset()

    def update(self, images: Tensor, captions: Sequence[str], *, real: bool) -> None:
        """Adds a batch (n, 3, S, S), uint8, to the metrics that take such images."""
        for name, metric in self.metrics.items():
            known = {"captions": list(captions), "real": real}
            passed = {key: known[key] for key in self.arguments[name]}
            if not real or "real" in passed:
                metric.update(images, **passed)

    def compute(self) -> dict[str, float]:
        """Returns <name>, or <name>_<key> for each key of a metric with several values.

        Raises ValueError for a metric that returns anything but numbers.
        """
        values = {}
        for name, metric in self.metrics.items():
            result = metric.compute()
            try:
                if isinstance(result, Mapping):
                    values |= {f"{name}_{key}": float(value) for key, value in result.items()}
                else:
                    values[name] = float(result)
            except (TypeError, ValueError, OverflowError, RuntimeError) as error:
                raise ValueError(
                    f"metrics.{name}: compute() returns {type(result).__name__}, and neither a "
                    f"number nor a mapping of numbers ({error})"
                ) from error
        return values


def _list_arguments(metric: ImageMetric) -> list[str]:
    """Returns which of `captions` and `real` the metric's `update` takes."""
    parameters = inspect.signature(metric.update).parameters
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    return [name for name in ("captions", "real") if takes_all or name in parameters]
