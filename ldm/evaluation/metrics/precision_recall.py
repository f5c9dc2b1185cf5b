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

from collections.abc import Iterator, Sequence

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
        return self.compare_without(generated, [])[0]

    def compare_without(
        self, generated: Tensor, groups: Sequence[Tensor]
    ) -> list[dict[str, float]]:
        """Returns `compare` of all rows (m, D), then of the rows without each group.

        groups: places of rows, of which none is in two groups. Each distance is computed once.
        """
        rows = to_feature_matrix(generated).to(self.rows.device)
        if rows.shape[1] != self.rows.shape[1]:
            raise ValueError(
                f"{rows.shape[1]} features cannot be compared with {self.rows.shape[1]} of the "
                "real images: use the same feature network"
            )
        rows = rows - self.centre
        members = rows.new_zeros(len(rows), len(groups) + 1)
        for i, group in enumerate(groups):
            members[group, i] = 1
        members[:, -1] = 1 - members.sum(dim=1)  # in no group
        radii, slack = _radii_without(rows, members.bool()), _slack(self.rows, rows)
        # Of each group: its rows in real balls; of each real row, the group's balls that hold it,
        # and the group's rows that its own ball holds.
        inside = rows.new_zeros(members.shape[1])
        recalls, holds = rows.new_zeros(2, members.shape[1], len(self.rows))
        regained = recalls.bool()  # by the wider balls that are without a group
        for part, balls, of in _split_into_blocks(rows, radii, members, across=len(self.rows)):
            squares = _squares(part, self.rows)  # (block, n)
            inside += of.T @ (squares <= self.inner + slack).any(dim=1).to(of.dtype)
            recalls += of.T @ (squares <= balls[:, :1] + slack).to(of.dtype)
            holds += of.T @ (squares < self.outer - slack).to(of.dtype)
            for i in range(1, len(groups) + 1):
                wider = (balls[:, i] > balls[:, 0]) & (of[:, i - 1] == 0)
                regained[i] |= (squares[wider] <= balls[wider, i, None] + slack).any(dim=0)
        stays = members.new_ones(len(inside), len(inside))  # all groups, then all but one
        stays[1:].fill_diagonal_(0)
        count = stays @ members.sum(dim=0)
        numbers = {
            "precision": stays @ inside / count,
            "recall": ((stays @ recalls > 0) | regained).double().mean(dim=1),
            "density": (stays @ holds).sum(dim=1) / (K_DENSITY * count),
            "coverage": (stays @ holds > 0).double().mean(dim=1),
        }
        rows_of_numbers = zip(*(values.tolist() for values in numbers.values()), strict=True)
        return [dict(zip(numbers, each, strict=True)) for each in rows_of_numbers]


def _radii_without(rows: Tensor, members: Tensor) -> Tensor:
    """Returns squared distances to the k-th nearest other row: of all rows, then without a group.

    members (n, groups + 1): which group a row is in, the last: none; returned are (n, groups + 1).
    k is that of precision and recall. A row's value without its own group is of no use.
    """
    k, groups = K_PRECISION_RECALL, [member.nonzero()[:, 0] for member in members.T]
    fewest = len(rows) - max(map(len, groups[:-1]), default=0)
    if fewest <= k:
        raise ValueError(f"{fewest} images have no neighbour number {k}: evaluate {k + 1} or more")
    found = []
    for (part,) in _split_into_blocks(rows, across=len(rows)):
        squares = _squares(part, rows)
        near = [
            squares[:, group].topk(min(k + 1, len(group)), largest=False).values for group in groups
        ]
        kept = [near, *(near[:i] + near[i + 1 :] for i in range(len(groups) - 1))]
        sets = (torch.cat(each, dim=1).topk(k + 1, largest=False, sorted=True) for each in kept)
        found.append(torch.stack([each.values[:, k] for each in sets], dim=1))  # itself first
    return torch.cat(found)


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
