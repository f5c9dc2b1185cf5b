"""The inception score (Salimans et al. 2016): each image has a clear class, all have many."""

import torch
from torch import Tensor


def inception_score(probabilities: Tensor, *, seed: int, splits: int = 10) -> float:
    """Returns exp of the mean KL divergence of p(class | image) (n, classes) from its mean.

    It is the mean over `splits` parts of the rows, shuffled by `seed`, as in torchmetrics.
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
    return float(torch.stack(scores).mean())
