"""A large image in windows of the size that the network was trained on."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.diffusion.conditioning import Condition
from ldm.diffusion.guidance.base import ConditionalDenoiser


@dataclass(frozen=True)
class TiledDenoiser:
    """A denoiser of any grid out of one for `side` x `side` cells.

    The x0_hats of windows, which overlap by `overlap` cells or more, are averaged with weights that
    fall towards each window's edge (Bar-Tal et al. 2023, MultiDiffusion, arXiv:2302.08113).
    """

    denoise: ConditionalDenoiser
    side: int
    overlap: int

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.side:
            raise ValueError(f"windows of {self.side} cells cannot overlap by {self.overlap}")

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """x0_hat (B, C, h, w); `cond.concat` (B, E, h, w) is cut as x_t is."""
        rows, columns = (compute_window_starts(n, self.side, self.overlap) for n in x_t.shape[-2:])
        if len(rows) == len(columns) == 1:
            return self.denoise(x_t, t, cond)
        window = make_window_weights(self.side, self.overlap).to(x_t)
        window = window[:, None] * window  # (side, side)
        total, weight = torch.zeros_like(x_t), torch.zeros_like(x_t[:1, :1])
        for top in rows:
            for left in columns:
                cut = (..., slice(top, top + self.side), slice(left, left + self.side))
                part = cond if cond.concat is None else replace(cond, concat=cond.concat[cut])
                total[cut] += window * self.denoise(x_t[cut], t, part)
                weight[cut] += window
        return total / weight


def compute_window_starts(length: int, side: int, overlap: int) -> list[int]:
    """The first cells of windows that cover `length` cells evenly; ValueError if there is none."""
    if length < side:
        raise ValueError(f"a grid of {length} cells is smaller than a window of {side}")
    more = -(-(length - side) // (side - overlap))  # windows after the first
    return [round(i * (length - side) / more) for i in range(more + 1)] if more else [0]


def make_window_weights(side: int, overlap: int) -> Tensor:
    """Weights (side,) that rise over the overlap from near 0 to 1, and fall likewise."""
    at = torch.arange(side) + 1.0
    return torch.minimum(at, at.flip(0)).clamp(max=overlap + 1) / (overlap + 1)
