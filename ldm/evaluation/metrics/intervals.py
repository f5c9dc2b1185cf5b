"""How far metrics would move if as many pictures were painted again: errors and intervals.

Means of one number a picture (CLIP score) get the percentile bootstrap. Shares, means of 0 and 1
(precision, accuracy), get Wilson's interval: near 0 and 1 the bootstrap, and value +- error, are
too narrow or a point (of 97 % in 150 pictures they hold the share 87 times in 100). Distances
between sets must not be bootstrapped: a set drawn with replacement holds some pictures twice, which
shrinks its covariance and adds k(x, x) to kernel means, and the Frechet distance rises by about its
own bias (D=64, n=320: by 2 to 16 standard errors), so that the interval misses the value. They come
with the error that the rows' influences tell in one pass (`frechet.py`, `kernels.py`): 0.9 to 1.5
times the deviation between sets drawn anew, Gaussians or drawn scenes in CLIP's features, and the
most where nothing but sampling sets the two sides apart.
What has no influence to write down (recall, coverage) is left to the jackknife over groups of rows,
which repeats nothing and compares sets of one size; these are shares as well, though not of
independent values, and get Wilson's interval for as many as would have the jackknife's error.

All of them take the real pictures as given, as published numbers do. They speak of the metric at
this number of pictures, not of its limit for many.
"""

import math
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

_BOOTSTRAP_CHUNK = 2**20  # rows drawn at a time


class Interval(NamedTuple):
    """The ends of a confidence interval."""

    low: float
    high: float


class Estimate(NamedTuple):
    """A metric and its standard error, known with `freedom` degrees of freedom."""

    value: float
    error: float
    degrees_of_freedom: float = math.inf

    def interval(self, *, level: float = 0.95) -> Interval:
        """value +- t error, where Student's t is taken to first order in 1 / freedom.

        Raises ValueError for a level outside (0, 1).
        """
        reach = self._student(level) * self.error
        return Interval(self.value - reach, self.value + reach)

    def share_interval(self, count: int, *, level: float = 0.95) -> Interval:
        """For a value that is a share of `count` 0s and 1s which depend on one another.

        Wilson's, of as many independent ones as would have this error (Korn and Graubard 1998,
        section 2), `count` at most. Raises ValueError as `interval`.
        """
        spread = self.value * (1 - self.value)
        effective = min(spread / self.error**2, count) if self.error and spread else count
        return _wilson_score_interval(self.value, effective, self._student(level))

    def _student(self, level: float) -> float:
        z = NormalDist().inv_cdf(_tail(level))
        return z + (z**3 + z) / (4 * self.degrees_of_freedom)


def wilson_interval(share: float, count: int, *, level: float = 0.95) -> Interval:
    """Wilson's interval of a share of `count` independent 0s and 1s (Wilson 1927), inside [0, 1].

    Raises ValueError where there are none, or for a share or a level that is none.
    """
    if count < 1 or not 0 <= share <= 1:
        raise ValueError(f"{share} is no share of {count} values")
    return _wilson_score_interval(share, count, NormalDist().inv_cdf(_tail(level)))


def _wilson_score_interval(share: float, count: float, z: float) -> Interval:
    """The shares p for which (share - p)^2 <= z^2 p (1 - p) / count."""
    weight = z * z / count
    middle = (share + weight / 2) / (1 + weight)
    reach = (weight * share * (1 - share) + weight * weight / 4) ** 0.5 / (1 + weight)
    # Without rounding at the borders, where a share may truly be.
    return Interval(middle - reach if share > 0 else 0.0, middle + reach if share < 1 else 1.0)


def bootstrap_mean(
    values: Tensor, *, seed: int, resamples: int = 2000, level: float = 0.95
) -> Interval:
    """The percentile interval of the mean of independent numbers (n,), one a picture.

    Not for numbers that are 0 or 1: their mean is a share, for `wilson`.
    Raises ValueError for fewer than two numbers, for NaN or infinity, or a level outside (0, 1).
    """
    if values.ndim != 1 or len(values) < 2 or not values.isfinite().all():
        raise ValueError(
            f"an interval takes two finite numbers or more, got {tuple(values.shape)} of which "
            f"{int(values.isfinite().sum())} are finite: evaluate more pictures"
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
    statistic: Callable[[Tensor], Mapping[str, float]], rows: Tensor, *, seed: int, groups: int = 20
) -> dict[str, Estimate]:
    """Numbers of all rows (n, ...), with errors from leaving out one of `groups` groups at a time.

    Groups are drawn at random and of one size, so that biases that depend on n cancel; rows left
    over from the division are in none. `statistic` is called groups + 1 times.
    Raises ValueError for fewer than two groups, or more than rows.
    """
    if not 2 <= groups <= len(rows):
        raise ValueError(
            f"{groups} groups of {len(rows)} rows: it takes 2 groups or more, "
            "and a picture or more in each"
        )
    size = len(rows) // groups
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    order = order.to(rows.device)
    whole = statistic(rows)
    without = [
        statistic(rows[torch.cat([order[: i * size], order[(i + 1) * size :]]).sort().values])
        for i in range(groups)
    ]
    # What turns the deviation between means of n - size rows into that of the mean of n.
    scale = (len(rows) - size) / (len(rows) * size) ** 0.5
    estimates = {}
    for name, value in whole.items():
        left = torch.tensor([one[name] for one in without], dtype=torch.float64)
        error = scale * left.std()
        estimates[name] = Estimate(float(value), float(error), groups - 1)
    return estimates


def _tail(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level is a share such as 0.95, got {level}")
    return (1 + level) / 2
