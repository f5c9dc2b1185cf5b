"""The Frechet distance of two sets of features, as Gaussians, and its standard error.

    d = |m_a - m_b|^2 + tr(A + B) - 2 tr((A^1/2 B A^1/2)^1/2)         A, B covariances, m means

On Inception's features it is the FID. The last trace is the sum of square roots of the eigenvalues
of R^T B R, for any R with R R^T = A: symmetric, and so real and never NaN. Those eigenvalues are
computed in float64, and only as many as the rank allows count: the root of a rounding error (1e-16)
is not small (1e-8). d has a bias of about c / n: compare sets of the same size n only.

Shapes: n rows (images), D features, r rank.
"""

import torch
from torch import Tensor

from ldm.evaluation.metrics.intervals import Estimate
from ldm.evaluation.metrics.moments import Moments, to_feature_matrix


def frechet_distance(reference: Moments, generated: Moments) -> float:
    """Returns the squared Frechet distance of two Gaussians, >= 0; symmetric up to rounding."""
    covariance = generated.covariance().to(reference.mean.device)
    _check(reference, len(generated.mean))
    root = reference.root
    values = torch.linalg.eigvalsh(root.T @ covariance @ root)
    roots = _roots(values, rank=generated.count - 1)
    apart = generated.mean.to(root.device) - reference.mean
    return _distance(apart, _trace(reference), _trace(generated).to(root.device), roots)


def frechet_estimate(reference: Moments, features: Tensor) -> Estimate:
    """Returns the distance of rows (n, D), with its standard error over draws of n images.

    The reference is taken as exact. The error comes from the influence of each row on the distance
    (the infinitesimal jackknife): a centred row c moves it by 2 c (m_b - m_a) + |c|^2 - c^T T c,
    where T is the linear map that carries B onto A. For n <= D it works in the span of the rows,
    n x n, and needs no root of the reference.
    """
    rows = to_feature_matrix(features).to(reference.mean.device)
    _check(reference, rows.shape[1])
    n, width = rows.shape
    if n < 2:
        raise ValueError(f"a covariance takes two rows or more, got {n}: evaluate more images")
    mean = rows.mean(dim=0)
    centred = rows - mean
    if n <= width:
        values, vectors = torch.linalg.eigh(centred @ reference.covariance() @ centred.T)
        roots = _roots(values / (n - 1), rank=min(n, reference.count) - 1)
        carried = (n - 1) * vectors[:, -len(roots) :].square() @ roots
    else:
        root = reference.root
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
    """Returns square roots of the greatest `rank` of ascending eigenvalues."""
    return values[-min(rank, len(values)) :].clamp(min=0).sqrt()


def _check(reference: Moments, width: int) -> None:
    if width != len(reference.mean):
        raise ValueError(
            f"{width} features cannot be compared with a reference of {len(reference.mean)}: "
            "compute it with the same feature network"
        )
