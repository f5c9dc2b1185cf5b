"""A positional input of residual blocks."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class PositionalMap(nn.Module):
    """A sum of the lowest `positional_waves`^2 cosines over the grid, weighted by the embedding.

    Convolutions do not know their position, so a pooled caption alone cannot say "red, on the
    left". The cosines are those of the discrete cosine transform.
    """

    def __init__(self, time_dim: int, channels: int, positional_waves: int) -> None:
        super().__init__()
        self.positional_waves = positional_waves
        self.proj = nn.Linear(time_dim, positional_waves**2 * channels)

    def forward(self, emb: Tensor, size: Sequence[int]) -> Tensor:
        """emb (B, T), size (h, w) -> (B, N, C)."""
        waves = self.positional_waves
        weights = self.proj(emb).unflatten(1, (waves**2, -1))  # (B, waves^2, C)
        down, across = (self._cosines(n, emb.device) for n in size)
        basis = torch.einsum("hi,wj->hwij", down, across).reshape(-1, waves**2)
        return basis.to(weights.dtype) @ weights

    def _cosines(self, n: int, device: torch.device) -> Tensor:
        x = (torch.arange(n, device=device) + 0.5) / n
        frequencies = torch.arange(self.positional_waves, device=device)
        cosines = torch.cos(math.pi * x[:, None] * frequencies)
        cosines[:, 1:] *= math.sqrt(2)  # the mean square is 1, as that of the constant
        return cosines  # (n, waves)
