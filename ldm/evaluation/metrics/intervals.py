"""Standard errors and confidence intervals of metrics, over draws of as many images.

Means of one number an image (CLIP score) get the percentile bootstrap. Shares (precision) get
Wilson's interval, because others are too narrow near 0 and 1. Distances between sets must not be
bootstrapped: a set drawn with replacement holds images twice, which raises the Frechet distance and
kernel means. They come with the error from the influence of each row (`frechet.py`,
`kernel_distances.py`). Recall and coverage have no influence function: they get the jackknife over
groups of rows, and Wilson's interval for as many values as would have the jackknife's error.

The real images are taken as exact, as in published numbers. The intervals are of the metric at this
number of images, not of its limit for many.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

_BOOTSTRAP_CHUNK = 2**20  # rows drawn at a time

Statistic = Callable[[Tensor, Sequence[Tensor]], Sequence[Mapping[str, float]]]


class Interval(NamedTuple):
    """The ends of a confidence interval."""

    low: float
    high: float


class Estimate(NamedTuple):
    """A metric and its standard error, with the degrees of freedom of the error."""

    value: float
    error: float
    degrees_of_freedom: float = math.inf

    def interval(self, *, level: float = 0.95) -> Interval:
        """Returns value +- t error, with Student's t to first order in 1 / degrees of freedom."""
        reach = self._student(level) * self.error
        return Interval(self.value - reach, self.value + reach)

    def share_interval(self, count: int, *, level: float = 0.95) -> Interval:
        """Returns the interval of a share of `count` 0s and 1s which depend on one another.

        It is Wilson's for as many independent values as would have this error (Korn and Graubard
        1998, section 2), `count` at most.
        """
        spread = self.value * (1 - self.value)
        effective = min(spread / self.error**2, count) if self.error and spread else count
        return _wilson_score_interval(self.value, effective, self._student(level))

    def _student(self, level: float) -> float:
        z = NormalDist().inv_cdf(_tail(level))
        return z + (z**3 + z) / (4 * self.degrees_of_freedom)


def wilson_interval(share: float, count: int, *, level: float = 0.95) -> Interval:
    """Returns Wilson's interval of a share of `count` independent 0s and 1s (Wilson 1927)."""
    if count < 1 or not 0 <= share <= 1:
        raise ValueError(f"{share} is no share of {count} values")
    return _wilson_score_interval(share, count, NormalDist().inv_cdf(_tail(level)))


def _wilson_score_interval(share: float, count: float, z: float) -> Interval:
    """Returns the shares p for which (share - p)^2 <= z^2 p (1 - p) / count."""
    weight = z * z / count
    middle = (share + weight / 2) / (1 + weight)
    reach = (weight * share * (1 - share) + weight * weight / 4) ** 0.5 / (1 + weight)
    # Without rounding at the borders, where a share may truly be.
    return Interval(middle - reach if share > 0 else 0.0, middle + reach if share < 1 else 1.0)


def bootstrap_mean(
    values: Tensor, *, seed: int, resamples: int = 2000, level: float = 0.95
) -> Interval:
    """Returns the percentile interval of the mean of independent numbers (n,), one an image.

    Means of 0s and 1s are shares, for `wilson_interval`.
    """
    if values.ndim != 1 or len(values) < 2 or not values.isfinite().all():
        raise ValueError(
            f"an interval takes two finite numbers or more, got {tuple(values.shape)} of which "
            f"{int(values.isfinite().sum())} are finite: evaluate more images"
        )
    tail = _tail(level)
    values = values.detach().cpu().double()
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    means = []
    for part in torch.arange(resamples).split(max(1, _BOOTSTRAP_CHUNK // n)):
        drawn = torch.randint(n, (len(part), n), generator=generator)
        means.append(values[drawn].mean(dim=1))
    ends = torch.cat(means).quantile(torch.tensor([1 - tail, tail], dtype=torch.float64))
    return Interval(*ends.tolist())


def jackknife(
    statistic: Statistic, rows: Tensor, *, seed: int, groups: int = 20
) -> dict[str, Estimate]:
    """Returns numbers of all rows (n, ...), with errors from leaving out one group at a time.

    Groups are random and of one size, so that biases that depend on n cancel; rows left over from
    the division are in none. statistic(rows, groups): the numbers of all rows, then those without
    each group, which is given by the places (size,) of its rows.
    """
    if not 2 <= groups <= len(rows):
        raise ValueError(
            f"{groups} groups of {len(rows)} rows: it takes 2 groups or more, "
            "and an image or more in each"
        )
    size = len(rows) // groups
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    whole, *without = statistic(rows, order[: groups * size].to(rows.device).split(size))
    # Turns the deviation between means of n - size rows into that of the mean of n rows.
    scale = (len(rows) - size) / (len(rows) * size) ** 0.5
    estimates = {}
    for name, value in whole.items():
        left = torch.tensor([one[name] for one in without], dtype=torch.float64)
        estimates[name] = Estimate(float(value), float(scale * left.std()), groups - 1)
    return estimates


def _tail(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level is a share such as 0.95, got {level}")
    return (1 + level) / 2
