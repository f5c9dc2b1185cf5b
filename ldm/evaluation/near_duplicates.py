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
    """Returns the group (N,) of each picture, and the `most` nearest pairs from `threshold` on.

    A group is a set that pairs from `threshold` on connect; its number is that of its first
    picture. Features (N, D) of zeros belong to no group. `done(n)` is called for n rows.
    """
    vectors, groups = F.normalize(features, dim=1), _Groups(len(features))
    nearest: list[PicturePair] = []
    for first, cosines in _iterate_blocks(vectors, vectors, device, upper=True, done=done):
        rows, columns = (cosines >= threshold).nonzero(as_tuple=True)
        values = cosines[rows, columns]
        best = values.topk(min(most, len(values))).indices
        rows, columns = rows + first[0], columns + first[1]
        groups.join(rows.cpu().numpy(), columns.cpu().numpy())
        found = zip(*(part[best].tolist() for part in (rows, columns, values)), strict=True)
        nearest = sorted([*nearest, *map(PicturePair._make, found)], key=_rank_pair)[:most]
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
    """Disjoint sets of the numbers below N (union-find with path halving)."""

    def __init__(self, count: int) -> None:
        self.parent = np.arange(count)

    def join(self, first: np.ndarray, second: np.ndarray) -> None:
        """Joins the sets of each pair; the least number of a set is its root."""
        roots = self.find_all() if len(first) else self.parent
        for one, other in np.unique(np.stack([roots[first], roots[second]], 1), axis=0).tolist():
            one, other = self._find(one), self._find(other)
            self.parent[max(one, other)] = min(one, other)

    def find_all(self) -> np.ndarray:
        roots = self.parent
        while not np.array_equal(roots, above := self.parent[roots]):
            roots = above
        return roots

    def _find(self, one: int) -> int:
        while (above := self.parent[one]) != one:
            self.parent[one] = self.parent[above]
            one = int(above)
        return int(one)
