"""DDIM inversion: from an image to the noise from which DDIM generates it."""

from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.guidance.base import Denoise
from ldm.diffusion.samplers.base import NoiseLevel, OnStep, compute_noise_levels, take_step
from ldm.diffusion.schedules import Schedule, expand_dims_like


@torch.no_grad()
def invert_ddim(
    denoise: Denoise,
    x0: Tensor,
    schedule: Schedule,
    timesteps: Tensor,
    *,
    rounds: int = 5,
    on_step: OnStep | None = None,
) -> Tensor:
    """The latents (B, C, h, w) at timesteps[0] from which DDIM generates `x0`.

    `timesteps` fall to 0, as a sampler takes them; to pure noise take two or more. The x0_hat at
    the noisy end of a step is unknown: each of `rounds` calls of the network improves its estimate
    (Pan et al. 2023, AIDI, section 3). One round is the original DDIM inversion (Dhariwal and
    Nichol 2021, appendix F). `on_step` gets each x0_hat, from clean to noisy.
    """
    if rounds < 1:
        raise ValueError(f"inversion takes one round or more, not {rounds}")
    ascending = timesteps.flip(0)
    x = x0
    for i, (clean, noisy) in enumerate(pairwise(compute_noise_levels(schedule, ascending))):
        estimate, last = x, None
        for _ in range(rounds):
            x0_hat = denoise(estimate, ascending[i + 1])
            result = step_back(x, estimate, x0_hat, clean, noisy)
            error = result - estimate
            estimate = result if last is None else secant(result, error, *last)
            last = result, error
        x = estimate
        if on_step is not None:
            on_step(i, x0_hat)
    return x


def step_back(
    x: Tensor, estimate: Tensor, x0_hat: Tensor, clean: NoiseLevel, noisy: NoiseLevel
) -> Tensor:
    """x at `clean` taken to `noisy`, by the x0_hat of the estimate there.

    The update rule holds x0_hat fixed or, with alpha and sigma exchanged, eps. The first improves
    an estimate at much noise, and is finite up to pure noise; the second at little noise.
    """
    if clean[0] * noisy[0] < clean[1] * noisy[1]:
        return take_step(x, x0_hat, clean, noisy)
    eps = (estimate - noisy[0] * x0_hat) / noisy[1]
    return take_step(x, eps, clean[::-1], noisy[::-1])


def secant(result: Tensor, error: Tensor, last_result: Tensor, last_error: Tensor) -> Tensor:
    """The estimate with the smallest error, were it linear (Anderson acceleration)."""
    change = (error - last_error).flatten(1)  # (B, C h w)
    tiny = torch.finfo(change.dtype).tiny
    share = (error.flatten(1) * change).sum(1) / change.square().sum(1).clamp(min=tiny)  # (B,)
    # Once the errors are rounding alone, their quotient means nothing.
    return result - expand_dims_like(share.clamp(-5, 5), result) * (result - last_result)
