"""Mean and covariance of feature rows (n, D), in float64."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def to_feature_matrix(features: Tensor) -> Tensor:
    """Returns feature rows (n, D) in float64, on their device; ValueError where they are bad."""
    if features.ndim != 2 or not features.is_floating_point():
        shape = tuple(features.shape)
        raise ValueError(f"features must be floating (n, D), got {features.dtype} {shape}")
    if features.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"features are {features.dtype}, which holds two or three digits: "
            "run the feature network in float32, outside autocast"
        )
    if not features.isfinite().all():
        bad = int((~features.isfinite()).any(dim=1).sum())
        raise ValueError(
            f"{bad} of {len(features)} feature rows hold NaN or infinity: "
            "look at the images they came from"
        )
    return features.detach().double()


@dataclass(frozen=True)
class Moments:
    """Count, mean (D,) and `scatter` (D, D), the sum of (x - mean)(x - mean)^T, of feature rows."""

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Returns the moments of rows (n, D)."""
        rows = to_feature_matrix(features)
        mean = rows.mean(dim=0)
        centred = rows - mean
        return cls(len(rows), mean, centred.T @ centred)

    def covariance(self) -> Tensor:
        """Returns the unbiased covariance (D, D); ValueError for fewer than two rows."""
        if self.count < 2:
            raise ValueError(
                f"a covariance takes two rows or more, got {self.count}: evaluate more images"
            )
        return self.scatter / (self.count - 1)

    @cached_property
    def root(self) -> Tensor:
        """A matrix (D, r), r < count, whose product with its transpose is the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance())
        # n centred rows span n - 1 directions at most: all others are rounding errors.
        rank = min(self.count - 1, len(values))
        return vectors[:, -rank:] * values[-rank:].clamp(min=0).sqrt()
