"""Samplers: from noise to data with a denoiser, by one update rule.

A sampler is stateless: all it sees is `denoise`, a schedule and a grid of times.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.guidance import Denoise
from ldm.diffusion.schedule import Schedule

Noise = Callable[[Tensor], Tensor]  # like torch.randn_like
OnStep = Callable[[int, Tensor], None]  # step number from 0, x0_hat


Level = tuple[float, float]  # (alpha, sigma) at one time


def step(
    x_t: Tensor, d: Tensor, now: Level, then: Level, *, up: float = 0.0, z: Tensor | None = None
) -> Tensor:
    """x_s from x_t along the data estimate `d`: the only update there is.

    `up` is the part of sigma_s that is fresh noise `z` (Song et al. 2021, DDIM, equation 12).
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = now, then
    ratio = math.sqrt(max(sigma_s**2 - up**2, 0.0)) / sigma_t
    x_s = ratio * x_t + (alpha_s - alpha_t * ratio) * d
    return x_s if z is None else x_s + up * z


def posterior_std(now: Level, then: Level) -> float:
    """Standard deviation of x_s given x_t and x0 (Ho et al. 2020, equation 7, any schedule)."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = now, then
    added = sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2  # variance that t has over s
    return sigma_s / sigma_t * math.sqrt(max(added, 0.0))


class DDIM:
    """d = x0_hat; `eta` goes from the ODE (0, DDIM) to the posterior's own noise (1, DDPM).

    With eta = 1 this is ancestral sampling (Ho et al. 2020, algorithm 2, with the smaller of their
    two variances), on any grid; with eta = 0 on the Flow schedule it is Euler's method.
    """

    def __init__(self, *, eta: float = 0.0) -> None:
        self.eta = eta

    @torch.no_grad()
    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        schedule: Schedule,
        times: Tensor,
        *,
        noise: Noise,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """x0 from x (B, C, h, w) at times[0]; `times` falls and ends in 0.

        `noise` is called once a step where eta > 0. `on_step` sees each step's x0_hat.
        """
        # The coefficients are plain numbers, so that no step waits for the device.
        levels = list(zip(*(part.tolist() for part in schedule(times)), strict=True))
        times = times.to(x.device)
        for i, (now, then) in enumerate(pairwise(levels)):
            x0_hat = denoise(x, times[i])
            up = self.eta * posterior_std(now, then)
            x = step(x, x0_hat, now, then, up=up, z=noise(x) if up > 0 else None)
            if on_step is not None:
                on_step(i, x0_hat)
        return x
