"""A positional input of residual blocks."""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from ldm.models.fused_linear import FusedLinear


class PositionalMap(nn.Module):
    """A sum of the lowest `positional_waves`^2 cosines over the grid, weighted by the embedding.

    Convolutions do not know their position, so a pooled caption alone cannot say "red, on the
    left". The cosines are those of the discrete cosine transform.
    """

    def __init__(self, time_dim: int, channels: int, positional_waves: int) -> None:
        super().__init__()
        self.positional_waves = positional_waves
        self.proj = FusedLinear(time_dim, channels, parts=positional_waves**2)

    def forward(self, emb: Tensor, size: Sequence[int]) -> Tensor:
        """emb (B, T), size (h, w) -> (B, N, C)."""
        waves = self.positional_waves
        weights = self.proj(emb).unflatten(1, (waves**2, -1))  # (B, waves^2, C)
        # Not inside a compiled graph, and not where only shapes are computed (FakeTensor).
        is_kept = type(emb) is Tensor and not torch.compiler.is_compiling()
        make = keep_cosine_basis if is_kept else make_cosine_basis
        basis = make(waves, tuple(size), emb.device)
        return basis.to(weights.dtype) @ weights


def make_cosine_basis(waves: int, size: tuple[int, int], device: torch.device) -> Tensor:
    """Returns the products of the lowest cosines down and across a grid (h, w): (N, waves^2)."""
    with torch.inference_mode(False):  # it is kept, and a backward pass may need it later
        down, across = (make_cosines(waves, n, device) for n in size)
        return torch.einsum("hi,wj->hwij", down, across).reshape(-1, waves**2)


keep_cosine_basis = lru_cache(maxsize=64)(make_cosine_basis)


def make_cosines(waves: int, n: int, device: torch.device) -> Tensor:
    """Returns the cosines of the lowest frequencies on n positions, each of mean square 1."""
    x = (torch.arange(n, device=device) + 0.5) / n
    cosines = torch.cos(math.pi * x[:, None] * torch.arange(waves, device=device))
    cosines[:, 1:] *= math.sqrt(2)
    return cosines  # (n, waves)
