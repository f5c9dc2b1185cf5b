"""Maximum mean discrepancy with two kernels: KID (polynomial) and CMMD (Gaussian, CLIP features).

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)          x real, y generated

It is computed in float64, because MMD^2 is a small difference of numbers near 1, and in blocks of
rows, because n^2 pairs may not fit into memory. A generated row y moves MMD^2 by
2 (E k(y, y') - E k(y, x)) / m to first order, which gives the standard errors.

Shapes: n real rows, m generated rows, D features.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ldm.evaluation.metrics.intervals import Estimate
from ldm.evaluation.metrics.moments import to_feature_matrix

_KERNEL_PAIRS_PER_BLOCK = 2**23  # evaluated at a time: 64 MiB

Kernel = Callable[[Tensor, Tensor], Tensor]  # (a, D), (b, D) -> (a, b)


class KernelDistances:
    """KID and CMMD from real rows (n, D); what depends on these alone is computed once."""

    def __init__(self, real: Tensor) -> None:
        self.real = real
        self._sums: dict[tuple[float, ...], Tensor] = {}  # over real pairs, by what they depend on

    def kid(
        self, generated: Tensor, *, seed: int, subsets: int = 100, subset_size: int = 1000
    ) -> Estimate:
        """Returns KID of rows (m, D): k(x, y) = (x y / D + 1)^3, the unbiased estimate.

        Subsets are drawn without replacement, as torchmetrics draws them after
        `torch.manual_seed(seed)`. It may be below 0. The error is over draws of as many images.
        """
        real, generated = _sides(self.real, generated)
        fewest = min(len(real), len(generated))
        if not 2 <= subset_size <= fewest or subsets < 1:
            raise ValueError(
                f"{subsets} subsets of {subset_size} cannot be drawn from {fewest} images: "
                f"set subset_size between 2 and {fewest}, or evaluate more images"
            )
        generator = torch.Generator().manual_seed(seed)
        theirs, ours = (real.new_zeros(subsets, len(side)) for side in (real, generated))
        for drawn in zip(theirs, ours, strict=True):
            for row in drawn:
                row[torch.randperm(len(row), generator=generator)[:subset_size]] = 1
        key = len(generated), seed, subsets, subset_size
        if key not in self._sums:
            self._sums[key] = _sum_pairs_within(real, theirs)
        own, own_means = _sum_pairs(generated, generated, ours, ours)
        cross, cross_means = _sum_pairs(generated, real, ours, theirs)
        own -= ours @ _self_kernel(generated)
        each = (self._sums[key] + own) / (subset_size * (subset_size - 1))
        each -= 2 * cross / subset_size**2
        influence = own_means - cross_means
        error = (4 * influence.var() / len(generated) + each.var(correction=0) / subsets).sqrt()
        return Estimate(float(each.mean()), float(error))

    def cmmd(self, generated: Tensor, *, sigma: float = 10.0, scale: float = 1000.0) -> Estimate:
        """Returns CMMD of CLIP image embeddings (n, D) and (m, D), with its standard error.

        As in the reference code of "Rethinking FID" (arXiv 2401.09603): rows have length 1,
        k(x, y) = exp(-|x - y|^2 / (2 sigma^2)), pairs of a row with itself count (the biased, never
        negative estimate, though the paper calls it unbiased), times 1000. Published numbers are of
        OpenAI's ViT-L/14 at 336 pixels.
        """
        real, generated = _sides(self.real, generated)
        for side in (real, generated):
            if not side.any(dim=1).all():
                raise ValueError(
                    "an embedding is all zeros and has no direction: it is no CLIP output"
                )
        real, generated = normalize(real), normalize(generated)

        def gaussian(a: Tensor, b: Tensor) -> Tensor:
            return (a @ b.T).sub_(1).div_(sigma**2).exp_()  # |a - b|^2 = 2 - 2 a b

        if (sigma,) not in self._sums:
            self._sums[sigma,] = _means(real, real, gaussian).mean()
        own, cross = _means(generated, generated, gaussian), _means(generated, real, gaussian)
        value = float(self._sums[sigma,] + own.mean() - 2 * cross.mean())
        error = float(2 * (own - cross).std()) / len(generated) ** 0.5
        return Estimate(max(scale * value, 0.0), scale * error)


def _polynomial(a: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(a.new_ones(1), a, b.T, alpha=1 / a.shape[1]).pow_(3)


def _self_kernel(rows: Tensor) -> Tensor:
    return rows.square().mean(dim=1).add_(1).pow_(3)


def _sum_pairs(a: Tensor, b: Tensor, in_a: Tensor, in_b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sums (s,) of k(a_i, b_j) over s subsets, and the means over j, for each i.

    The subsets are 0s and 1s (s, len(a)) and (s, len(b)).
    """
    step = max(1, _KERNEL_PAIRS_PER_BLOCK // len(b))
    sums, means = a.new_zeros(len(in_a)), []
    for block, rows in zip(a.split(step), in_a.split(step, dim=1), strict=True):
        kernel = _polynomial(block, b)
        sums += (rows @ kernel).mul_(in_b).sum(dim=1)
        means.append(kernel.mean(dim=1))
    return sums, torch.cat(means)


def _sum_pairs_within(rows: Tensor, subsets: Tensor) -> Tensor:
    """Returns the sums (s,) of k(x_i, x_j), i != j, over s subsets, 0s and 1s (s, n)."""
    n, size = len(rows), int(subsets[0].sum())
    if 2 * len(subsets) * size**2 < n**2:  # the subsets have fewer pairs than all rows
        parts = [rows[chosen.nonzero()[:, 0]] for chosen in subsets]
        sums = torch.stack([_polynomial(part, part).sum() for part in parts])
    else:
        step, sums = max(1, _KERNEL_PAIRS_PER_BLOCK // n), rows.new_zeros(len(subsets))
        for first in range(0, n, step):
            kernel = _polynomial(rows[first : first + step], rows[first:])
            kernel[:, step:] *= 2  # of both orders
            sums += (subsets[:, first : first + step] @ kernel).mul_(subsets[:, first:]).sum(dim=1)
    return sums - subsets @ _self_kernel(rows)


def _means(a: Tensor, b: Tensor, kernel: Kernel) -> Tensor:
    """Returns the mean of k(a_i, b_j) over j, for each i."""
    blocks = a.split(max(1, _KERNEL_PAIRS_PER_BLOCK // len(b)))
    return torch.cat([kernel(block, b).mean(dim=1) for block in blocks])


def _sides(real: Tensor, generated: Tensor) -> tuple[Tensor, Tensor]:
    real = to_feature_matrix(real)
    generated = to_feature_matrix(generated).to(real.device)
    if real.shape[1] != generated.shape[1] or min(len(real), len(generated)) < 2:
        raise ValueError(
            f"real and generated features are {tuple(real.shape)} and {tuple(generated.shape)}: "
            "they must be of one network, and two rows or more"
        )
    return real, generated
