"""The inception score (Salimans et al. 2016): each image has a clear class, all have many."""

from typing import NamedTuple

import torch
from torch import Tensor


class InceptionScore(NamedTuple):
    """Mean and standard deviation over splits."""

    mean: float
    std: float


def inception_score(probabilities: Tensor, *, seed: int, splits: int = 10) -> InceptionScore:
    """Returns exp of the mean KL divergence of p(class | image) (n, classes) from its mean.

    Rows are shuffled by `seed` and cut into `splits` parts as in torchmetrics; the deviation
    between parts is the sample's, as there, and 0 for one part.
    Raises ValueError where rows are no distributions, or a part has fewer than two.
    """
    n = len(probabilities)
    if probabilities.ndim != 2 or not torch.is_floating_point(probabilities):
        shape = tuple(probabilities.shape)
        raise ValueError(f"probabilities must be floating (n, classes), got {shape}")
    if splits < 1 or n < 2 * splits:
        raise ValueError(
            f"{n} images are too few for {splits} splits: evaluate {2 * splits} or lower splits"
        )
    rows = probabilities.detach().double()
    sums = rows.sum(dim=1)
    if not (rows >= 0).all() or not torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        raise ValueError(
            "rows must be probabilities: none below 0 and a sum of 1; take softmax of logits first"
        )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    scores = []
    for part in rows[order.to(rows.device)].chunk(splits):
        mean = part.mean(dim=0)
        divergence = torch.xlogy(part, part).sum(dim=1) - torch.xlogy(part, mean).sum(dim=1)
        scores.append(divergence.mean().exp())
    each = torch.stack(scores)
    return InceptionScore(float(each.mean()), float(each.std()) if splits > 1 else 0.0)
