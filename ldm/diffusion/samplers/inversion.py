"""From a picture back to the noise that DDIM makes it of.

Shapes: B batch, C latent channels, h w latent grid.
"""

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
    """The latents (B, C, h, w) at times[0] of which DDIM over `times` makes `x0`.

    `times` falls to 0, as a sampler takes it, and is walked backwards by the same update rule. What
    a step saw at its noisy end is not known on the way back: it is guessed from the clean end and
    bettered `rounds` times (Pan et al. 2023, AIDI, section 3), a call of the network each. One
    round is DDIM inversion as first published (Dhariwal and Nichol 2021, appendix F), from which
    the way forwards ends near x0, not in it. `on_step` sees each x0_hat, from clean to noisy.
    From pure noise one step would forget x0: there it takes two or more.
    Raises ValueError where rounds is below 1.
    """
    if rounds < 1:
        raise ValueError(f"inversion takes one round or more, not {rounds}")
    ascending = timesteps.flip(0)
    places = compute_noise_levels(schedule, ascending)
    x = x0
    for i, (clean, noisy) in enumerate(pairwise(places)):
        end, last = x, None
        for _ in range(rounds):
            x0_hat = denoise(end, ascending[i + 1])
            found = step_back(x, end, x0_hat, clean, noisy)
            miss = found - end
            end = found if last is None else secant(found, miss, *last)
            last = found, miss
        x = end
        if on_step is not None:
            on_step(i, x0_hat)
    return x


def step_back(
    x: Tensor, end: Tensor, x0_hat: Tensor, clean: NoiseLevel, noisy: NoiseLevel
) -> Tensor:
    """x at `clean` taken to `noisy`, with what the network says at the guess `end`.

    The update rule may hold x0_hat fixed or, with alpha and sigma in each other's places, eps. The
    one makes a wrong guess better in much noise and is finite up to pure noise; the other in little
    noise, from data on.
    """
    if clean[0] * noisy[0] < clean[1] * noisy[1]:
        return take_step(x, x0_hat, clean, noisy)
    eps = (end - noisy[0] * x0_hat) / noisy[1]
    return take_step(x, eps, clean[::-1], noisy[::-1])


def secant(found: Tensor, miss: Tensor, last_found: Tensor, last_miss: Tensor) -> Tensor:
    """The guess at which an image's miss would be least, were it a line (Anderson acceleration)."""
    change = (miss - last_miss).flatten(1)  # (B, C h w)
    least = torch.finfo(change.dtype).tiny
    share = (miss.flatten(1) * change).sum(1) / change.square().sum(1).clamp(min=least)  # (B,)
    # Where rounding is all that is left of the misses, their quotient says nothing.
    return found - expand_dims_like(share.clamp(-5, 5), found) * (found - last_found)
