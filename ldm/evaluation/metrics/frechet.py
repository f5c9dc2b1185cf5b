"""The Frechet distance of two sets of features, as Gaussians, and what sampling leaves open in it.

    d = |m_a - m_b|^2 + tr(A + B) - 2 tr((A^1/2 B A^1/2)^1/2)         A, B covariances, m means

On Inception's features it is the FID. The last trace is the sum of square roots of the eigenvalues
of R^T B R, for any R with R R^T = A: symmetric, and so real and never NaN. Those eigenvalues are
computed in float64 and their number is cut to the rank that the counts allow, because the root of
a rounding error (1e-16) is no longer small (1e-8).

d of n pictures lies above d of infinitely many, by about c / n: compare like n only.

Shapes: n rows (pictures), D features, r rank.
"""

import torch
from torch import Tensor

from ldm.evaluation.metrics.intervals import Estimate
from ldm.evaluation.metrics.moments import Moments, to_feature_matrix


def frechet_distance(reference: Moments, generated: Moments) -> float:
    """The squared Frechet distance of two Gaussians, >= 0; symmetric up to rounding.

    The reference keeps its root, so that comparing it again costs a third.
    Raises ValueError for fewer than two rows on a side, or another number of features.
    """
    covariance = generated.covariance().to(reference.mean.device)
    _check(reference, len(generated.mean))
    root = reference.root()
    values = torch.linalg.eigvalsh(root.T @ covariance @ root)
    roots = _roots(values, rank=generated.count - 1)
    apart = generated.mean.to(root.device) - reference.mean
    return _distance(apart, _trace(reference), _trace(generated).to(root.device), roots)


def frechet_estimate(reference: Moments, features: Tensor) -> Estimate:
    """The same distance for rows (n, D) at hand, with its standard error over draws of n pictures.

    The reference is taken as given. The error comes from the influence of each row on the distance
    (the infinitesimal jackknife): a row c, centred, moves it by
    2 c (m_b - m_a) + |c|^2 - c^T T c, where T is the linear map that carries B onto A. No row is
    drawn twice, which would raise the distance itself: see `intervals.py`. For n <= D it works in
    the span of the rows, n x n, and needs no root of the reference.
    Raises ValueError as `frechet_distance` does.
    """
    rows = to_feature_matrix(features).to(reference.mean.device)
    _check(reference, rows.shape[1])
    n, width = rows.shape
    if n < 2:
        raise ValueError(f"a covariance takes two rows or more, got {n}: evaluate more pictures")
    mean = rows.mean(dim=0)
    centred = rows - mean
    if n <= width:
        values, vectors = torch.linalg.eigh(centred @ reference.covariance() @ centred.T)
        roots = _roots(values / (n - 1), rank=min(n, reference.count) - 1)
        carried = (n - 1) * vectors[:, -len(roots) :].square() @ roots
    else:
        root = reference.root()
        covariance = centred.T @ centred / (n - 1)
        values, vectors = torch.linalg.eigh(root.T @ covariance @ root)
        roots = _roots(values, rank=n - 1)
        inverse = torch.where(roots > 1e-8 * roots[-1], 1 / roots, 0)
        carried = (centred @ (root @ vectors)).square_() @ inverse
    lengths = centred.square().sum(dim=1)
    apart = mean - reference.mean
    influence = centred @ (2 * apart) + lengths - carried
    value = _distance(apart, _trace(reference), lengths.sum() / (n - 1), roots)
    return Estimate(value, float(influence.std() / n**0.5))


def _distance(apart: Tensor, trace_a: Tensor, trace_b: Tensor, roots: Tensor) -> float:
    return max(float(apart.square().sum() + trace_a + trace_b - 2 * roots.sum()), 0.0)


def _trace(moments: Moments) -> Tensor:
    return moments.scatter.trace() / (moments.count - 1)


def _roots(values: Tensor, *, rank: int) -> Tensor:
    """Square roots of the greatest `rank` of ascending eigenvalues."""
    return values[-min(rank, len(values)) :].clamp(min=0).sqrt()


def _check(reference: Moments, width: int) -> None:
    if width != len(reference.mean):
        raise ValueError(
            f"{width} features cannot be compared with a reference of {len(reference.mean)}: "
            "compute it with the same feature network"
        )
