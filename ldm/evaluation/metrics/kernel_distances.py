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
from torchmetrics.image.kid import poly_mmd

from ldm.evaluation.metrics.intervals import Estimate
from ldm.evaluation.metrics.moments import to_feature_matrix

_KERNEL_PAIRS_PER_BLOCK = 2**23  # evaluated at a time: 64 MiB

Kernel = Callable[[Tensor, Tensor], Tensor]  # (a, D), (b, D) -> (a, b)


def kid(
    real: Tensor, generated: Tensor, *, seed: int, subsets: int = 100, subset_size: int = 1000
) -> Estimate:
    """Returns KID of rows (n, D) and (m, D): k(x, y) = (x y / D + 1)^3, the unbiased estimate.

    Subsets are drawn without replacement, as torchmetrics draws them after
    `torch.manual_seed(seed)`. It may be below 0. The error is over draws of as many images.
    """
    real, generated = _sides(real, generated)
    fewest = min(len(real), len(generated))
    if not 2 <= subset_size <= fewest or subsets < 1:
        raise ValueError(
            f"{subsets} subsets of {subset_size} cannot be drawn from {fewest} images: "
            f"set subset_size between 2 and {fewest}, or evaluate more images"
        )
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        sides = [
            side[torch.randperm(len(side), generator=generator)[:subset_size].to(side.device)]
            for side in (real, generated)
        ]
        values.append(poly_mmd(*sides))
    each = torch.stack(values)
    influence = _means(generated, generated, _polynomial) - _means(generated, real, _polynomial)
    error = (4 * influence.var() / len(generated) + each.var(correction=0) / subsets).sqrt()
    return Estimate(float(each.mean()), float(error))


def cmmd(
    real: Tensor, generated: Tensor, *, sigma: float = 10.0, scale: float = 1000.0
) -> Estimate:
    """Returns CMMD of CLIP image embeddings (n, D) and (m, D), with its standard error.

    As in the reference code of "Rethinking FID" (arXiv 2401.09603): rows have length 1,
    k(x, y) = exp(-|x - y|^2 / (2 sigma^2)), pairs of a row with itself count (the biased, never
    negative estimate, though the paper calls it unbiased), times 1000. Published numbers are of
    OpenAI's ViT-L/14 at 336 pixels.
    """
    real, generated = _sides(real, generated)
    for side in (real, generated):
        if not side.any(dim=1).all():
            raise ValueError("an embedding is all zeros and has no direction: it is no CLIP output")
    real, generated = normalize(real), normalize(generated)

    def gaussian(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T).sub_(1).div_(sigma**2).exp_()  # |a - b|^2 = 2 - 2 a b

    own, cross = _means(generated, generated, gaussian), _means(generated, real, gaussian)
    value = float(_means(real, real, gaussian).mean() + own.mean() - 2 * cross.mean())
    error = float(2 * (own - cross).std()) / len(generated) ** 0.5
    return Estimate(max(scale * value, 0.0), scale * error)


def _polynomial(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T).div_(a.shape[1]).add_(1).pow_(3)


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
