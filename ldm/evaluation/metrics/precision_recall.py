"""Quality and variety by nearest neighbours: precision, recall, density, coverage.

A set's manifold is the union of balls around its rows, each as wide as the k-th nearest other row.
Kynkaanniemi et al. 2019 (k = 3, a ball holds its border):
    precision   share of generated rows inside the real manifold
    recall      share of real rows inside the generated manifold
Naeem et al. 2020 (k = 5, the border is outside, as in their code):
    density     mean over generated rows of (real balls that hold it) / k; real rows have 1
    coverage    share of real balls that hold a generated row
Coverage and density do not use the generated manifold, which an outlier inflates. All four depend
on the numbers of rows: compare sets of the same size.

Shapes: n real rows, m generated rows, D features.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ldm.evaluation.metrics.moments import to_feature_matrix

K_PRECISION_RECALL = 3  # of precision and recall
K_DENSITY = 5  # of density and coverage
_DISTANCES_PER_BLOCK = 2**23  # evaluated at a time: 64 MiB

# Squared distances come from |a|^2 + |b|^2 - 2 a b, which is faster than differences. Its error is
# about 1e-15 of the longest row's square, on centred rows in float64. Distances that differ by
# less than this share of it count as equal, so that copies of real images tie.
_EQUAL = 1e-12


class Manifold:
    """The manifold of real rows (n, D), of which there must be 6 or more."""

    def __init__(self, real: Tensor) -> None:
        real = to_feature_matrix(real)
        self.centre = real.mean(dim=0)
        self.rows = real - self.centre
        self.inner, self.outer = _radii(self.rows, (K_PRECISION_RECALL, K_DENSITY))

    def compare(self, generated: Tensor) -> dict[str, float]:
        """Returns precision, recall and coverage in [0, 1] and density, >= 0, of rows (m, D)."""
        rows = to_feature_matrix(generated).to(self.rows.device)
        if rows.shape[1] != self.rows.shape[1]:
            raise ValueError(
                f"{rows.shape[1]} features cannot be compared with {self.rows.shape[1]} of the "
                "real images: use the same feature network"
            )
        rows = rows - self.centre
        (own,) = _radii(rows, (K_PRECISION_RECALL,))
        slack = _slack(self.rows, rows)
        inside = held = 0
        recalled = torch.zeros(len(self.rows), dtype=torch.bool, device=rows.device)
        covered = recalled.clone()
        for part, radius in _split_into_blocks(rows, own, across=len(self.rows)):
            squares = _squares(part, self.rows)  # (block, n)
            inside += (squares <= self.inner + slack).any(dim=1).sum()
            recalled |= (squares <= radius[:, None] + slack).any(dim=0)
            holds = squares < self.outer - slack
            held += holds.sum()
            covered |= holds.any(dim=0)
        return {
            "precision": int(inside) / len(rows),
            "recall": int(recalled.sum()) / len(self.rows),
            "density": int(held) / (K_DENSITY * len(rows)),
            "coverage": int(covered.sum()) / len(self.rows),
        }


def _radii(rows: Tensor, ks: tuple[int, ...]) -> list[Tensor]:
    """Returns squared distances (n,) to the k-th nearest other row, for each k."""
    most = max(ks)
    if len(rows) <= most:
        raise ValueError(
            f"{len(rows)} images have no neighbour number {most}: evaluate {most + 1} or more"
        )
    found = []
    for (part,) in _split_into_blocks(rows, across=len(rows)):
        squares = _squares(part, rows)
        found.append(squares.topk(most + 1, largest=False, sorted=True).values)  # itself first
    nearest = torch.cat(found)
    return [nearest[:, k].contiguous() for k in ks]


def _squares(a: Tensor, b: Tensor) -> Tensor:
    lengths = b.square().sum(dim=1)
    squares = torch.addmm(lengths, a, b.T, alpha=-2)
    return squares.add_(a.square().sum(dim=1, keepdim=True)).clamp_(min=0)


def _slack(*sides: Tensor) -> float:
    return _EQUAL * max(float(side.square().sum(dim=1).max()) for side in sides)


def _split_into_blocks(*tables: Tensor, across: int) -> Iterator[tuple[Tensor, ...]]:
    """Cuts tables into blocks of rows whose distances to `across` others fit into memory."""
    return zip(
        *(table.split(max(1, _DISTANCES_PER_BLOCK // across)) for table in tables), strict=True
    )
