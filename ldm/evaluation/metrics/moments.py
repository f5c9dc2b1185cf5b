"""Mean and covariance of feature rows, accumulated in float64.

Sums of x and of x x^T lose the digits of the covariance where features lie far from zero; centred
second moments, joined by Chan's formula, lose none.

Shapes: n rows (images), D features, r rank.
"""

import torch
from torch import Tensor


def to_feature_matrix(features: Tensor) -> Tensor:
    """Returns feature rows (n, D) in float64, on their device.

    Raises ValueError for another shape, for half precision and for numbers that are not finite.
    """
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


class Moments:
    """Count, mean (D,) and centred second moments `scatter` (D, D) of feature rows, in float64.

    `scatter` is the sum of (x - mean)(x - mean)^T. Moments of disjoint sets add up.
    """

    def __init__(self, width: int, *, device: torch.device | str | None = None) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._root: Tensor | None = None

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Returns the moments of rows (n, D)."""
        rows = to_feature_matrix(features)
        moments = cls(rows.shape[1], device=rows.device)
        moments.add(rows)
        return moments

    def add(self, features: Tensor) -> None:
        """Adds rows (n, D), on any device."""
        rows = to_feature_matrix(features).to(self.mean.device)
        self._check(rows.shape[1])
        if len(rows):
            mean = rows.mean(dim=0)
            centred = rows - mean
            self._join(len(rows), mean)
            self.scatter.addmm_(centred.T, centred)

    def __add__(self, other: "Moments") -> "Moments":
        """Returns the moments of both sets of rows together."""
        self._check(len(other.mean))
        both = Moments(len(self.mean), device=self.mean.device)
        for one in (self, other):
            if one.count:
                both._join(one.count, one.mean.to(self.mean.device))
                both.scatter += one.scatter.to(self.mean.device)
        return both

    def covariance(self) -> Tensor:
        """Returns the unbiased covariance (D, D); ValueError for fewer than two rows."""
        if self.count < 2:
            raise ValueError(
                f"a covariance takes two rows or more, got {self.count}: evaluate more images"
            )
        return self.scatter / (self.count - 1)

    def root(self) -> Tensor:
        """Returns a matrix (D, r), r < count, whose product with its transpose is the covariance.

        It costs an eigendecomposition, which is stored until rows are added.
        """
        if self._root is None:
            values, vectors = torch.linalg.eigh(self.covariance())
            # n centred rows span n - 1 directions at most: what is beyond is rounding.
            rank = min(self.count - 1, len(values))
            self._root = vectors[:, -rank:] * values[-rank:].clamp(min=0).sqrt()
        return self._root

    def _join(self, count: int, mean: Tensor) -> None:
        """Adds `count` rows without their own scatter, which the caller adds."""
        total = self.count + count
        apart = mean - self.mean
        self.scatter.addr_(apart, apart, alpha=self.count * count / total)
        self.mean.add_(apart, alpha=count / total)
        self.count = total
        self._root = None

    def _check(self, width: int) -> None:
        if width != len(self.mean):
            raise ValueError(
                f"{width} features do not go with {len(self.mean)}: "
                "they come from different feature networks"
            )
