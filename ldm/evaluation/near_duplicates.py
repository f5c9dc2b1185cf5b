"""Near-duplicate pictures: those whose features point in nearly the same direction.

Shapes: N pictures, M pictures of another set, D features. No matrix N x N is in memory.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# The least cosine of near-duplicates, by network: docs/data.md has what it finds.
DUPLICATE_THRESHOLDS = {"efficientnet": 0.9}
_BLOCK = 2048  # pictures


class PicturePair(NamedTuple):
    """Two pictures by number, and the cosine of their features."""

    first: int
    second: int
    cosine: float


def group_near_duplicates(
    features: Tensor,
    *,
    threshold: float,
    most: int = 0,
    device: torch.device | None = None,
    done: Callable[[int], object] = lambda count: None,
) -> tuple[np.ndarray, list[PicturePair]]:
    """Returns the group (N,) of each picture, and the `most` nearest pairs.

    A group is a set that pairs with a cosine from `threshold` on connect; its number is that of its
    first picture. Features (N, D) of zeros are alone. `done(n)` is called for n rows.
    """
    vectors, groups = F.normalize(features, dim=1), _Groups(len(features))
    nearest: list[PicturePair] = []
    for first, cosines in _iterate_blocks(vectors, vectors, device, upper=True, done=done):
        rows, columns = (cosines >= threshold).nonzero(as_tuple=True)
        groups.join((rows + first[0]).cpu().numpy(), (columns + first[1]).cpu().numpy())
        values, places = cosines.flatten().topk(min(most, cosines.numel()))
        for value, place in zip(values.tolist(), places.tolist(), strict=True):
            row, column = divmod(place, cosines.shape[1])
            if first[0] + row < first[1] + column:
                nearest.append(PicturePair(first[0] + row, first[1] + column, value))
        nearest = sorted(nearest, key=_rank_pair)[:most]
    return groups.find_all(), nearest


def find_nearest_pictures(
    features: Tensor,
    others: Tensor,
    *,
    device: torch.device | None = None,
    done: Callable[[int], object] = lambda count: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns number (N,) and cosine (N,) of the nearest of `others` (M, D) to each picture."""
    number, cosine = torch.zeros(len(features), dtype=torch.long), torch.zeros(len(features))
    cosine -= 2
    blocks = _iterate_blocks(
        F.normalize(features, dim=1), F.normalize(others, dim=1), device, upper=False, done=done
    )
    for (row, column), cosines in blocks:
        value, place = cosines.max(1)
        rows = slice(row, row + len(value))
        value, place = value.cpu(), place.cpu() + column
        is_nearer = value > cosine[rows]
        cosine[rows] = torch.where(is_nearer, value, cosine[rows])
        number[rows] = torch.where(is_nearer, place, number[rows])
    return number.numpy(), cosine.numpy()


def _rank_pair(pair: PicturePair) -> tuple[float, int, int]:
    return -pair.cosine, pair.first, pair.second


def _iterate_blocks(
    vectors: Tensor,
    others: Tensor,
    device: torch.device | None,
    *,
    upper: bool,
    done: Callable[[int], object],
) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Yields first row and column, and cosines, of each block; upper: -1 for pairs i >= j."""
    for row in range(0, len(vectors), _BLOCK):
        part = vectors[row : row + _BLOCK].to(device)
        for column in range(row if upper else 0, len(others), _BLOCK):
            cosines = part @ others[column : column + _BLOCK].to(device).T
            if upper and row == column:
                cosines = cosines.triu(1) - torch.ones_like(cosines).tril()
            yield (row, column), cosines
        done(len(part))


class _Groups:
    """Disjoint sets of the numbers below N; the least number of a set is its root."""

    def __init__(self, count: int) -> None:
        self.parent = np.arange(count)

    def join(self, first: np.ndarray, second: np.ndarray) -> None:
        """Joins the sets of each pair: all roots at once move below their least neighbour."""
        while len(first):
            roots = self.find_all()
            first, second = roots[first], roots[second]
            differ = first != second
            first, second = first[differ], second[differ]
            np.minimum.at(self.parent, np.maximum(first, second), np.minimum(first, second))

    def find_all(self) -> np.ndarray:
        while not np.array_equal(self.parent, above := self.parent[self.parent]):
            self.parent = above
        return self.parent
