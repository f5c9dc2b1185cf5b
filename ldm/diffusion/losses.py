"""Losses: how much an error of the network's output costs, element by element."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.schedules import expand_dims_like

# error (B, C, h, w), t (B,), log SNR (B,) -> loss (B, C, h, w)
ElementwiseLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


class SquaredLoss:
    """error^2 (Ho et al. 2020, equation 14)."""

    def __call__(self, error: Tensor, t: Tensor, log_snr: Tensor) -> Tensor:
        return error.square()


class PseudoHuberLoss:
    """2 c (sqrt(error^2 + c^2) - c): near error^2 below c, near 2 c |error| above.

    Song and Dhariwal 2024, arXiv:2310.14189. schedule: how c changes with t (Khrapov et al. 2024,
    arXiv:2403.16728): `constant`; `exponential`, c^t; `snr`, c + (1 - c) / (1 + sigma / alpha)^2.
    """

    def __init__(self, c: float = 0.1, *, schedule: str = "constant") -> None:
        if schedule not in ("constant", "exponential", "snr"):
            raise ValueError(f"loss.schedule '{schedule}' is none of constant, exponential, snr")
        if not 0 < c < math.inf or (c > 1 and schedule != "constant"):
            raise ValueError(
                f"loss.c must be above 0, and at most 1 unless loss.schedule=constant, got {c}"
            )
        self.c, self.schedule = c, schedule

    def __call__(self, error: Tensor, t: Tensor, log_snr: Tensor) -> Tensor:
        c = expand_dims_like(self.c_at(t, log_snr), error).to(error.dtype)
        # A form without the difference of two near numbers: small errors keep their digits.
        return 2 * c * error.square() / ((error.square() + c.square()).sqrt() + c)

    def c_at(self, t: Tensor, log_snr: Tensor) -> Tensor:
        """c at these times, (B,)."""
        if self.schedule == "constant":
            return torch.full_like(log_snr, self.c)
        if self.schedule == "exponential":
            return self.c ** t.to(log_snr.dtype)
        return self.c + (1 - self.c) / (1 + (-log_snr / 2).exp()).square()
