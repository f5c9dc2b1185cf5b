"""What an embedding says of places.

Shapes: B batch, C channels, h w grid, N = h * w positions, T time width.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class PositionalMap(nn.Module):
    """A map over the grid: the embedding weighs its lowest `positional_waves`^2 cosines.

    A caption's summary that is added everywhere cannot say "red, on the left": convolutions do not
    know where they are. The cosines are those of the discrete cosine transform, at any grid size.
    """

    def __init__(self, time_dim: int, channels: int, positional_waves: int) -> None:
        super().__init__()
        self.positional_waves = positional_waves
        self.proj = nn.Linear(time_dim, positional_waves**2 * channels)

    def forward(self, emb: Tensor, size: Sequence[int]) -> Tensor:
        """emb (B, T), size (h, w) -> (B, N, C)."""
        weights = self.proj(emb).unflatten(
            1, (self.positional_waves**2, -1)
        )  # (B, positional_waves^2, C)
        down, across = (self._cosines(n, emb.device) for n in size)
        basis = torch.einsum("hi,wj->hwij", down, across).reshape(-1, self.positional_waves**2)
        return basis.to(weights.dtype) @ weights

    def _cosines(self, n: int, device: torch.device) -> Tensor:
        places = (torch.arange(n, device=device) + 0.5) / n
        cosines = torch.cos(
            math.pi * places[:, None] * torch.arange(self.positional_waves, device=device)
        )
        cosines[:, 1:] *= math.sqrt(2)  # a mean square of one, as the constant has
        return cosines  # (n, positional_waves)
