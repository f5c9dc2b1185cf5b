"""Feature rows of a known distribution: Gaussians whose spectrum falls as that of features does."""

import torch
from torch import Tensor


def gaussian_rows(
    n: int, width: int, *, seed: int, shift: float = 0.0, spread: float = 1.0, offset: float = 0.0
) -> Tensor:
    """float64 (n, D): variances 1, 1/2, 1/3, ... in directions that are the same for every seed."""
    axes = torch.randn(width, width, generator=torch.Generator().manual_seed(0)).double()
    turn = torch.linalg.qr(axes).Q
    rows = torch.randn(n, width, generator=torch.Generator().manual_seed(seed)).double()
    rows = rows * spread / torch.arange(1, width + 1).sqrt()
    rows[:, 0] += shift
    return rows @ turn + offset
