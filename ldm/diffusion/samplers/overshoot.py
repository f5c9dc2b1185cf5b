"""A warning before sampling, where a multistep solver overshoots: images get too much contrast."""

from copy import copy

import torch
from torch import Tensor

from ldm.diffusion.samplers.base import Sampler
from ldm.diffusion.schedules import Schedule

DATA_STD = 0.3  # of the normal data; latents have about 1, and less for one prompt
MAX_OVERSHOOT = 1.2  # the ratio of standard deviations from which on there is a warning


def measure_overshoot(
    sampler: Sampler, schedule: Schedule, steps: int, *, start: float = 1.0
) -> float:
    """The standard deviation of sampled normal data, whose denoiser is known, over its own."""
    # Exact, as all is linear: image 0 follows the noise at the start, each other image one draw.
    sampler = copy(sampler)  # not dataclasses.replace: a class may have a constructor of its own
    for bound in ("clip", "quantile"):
        object.__setattr__(sampler, bound, None)
    timesteps = sampler.timesteps(schedule, steps, start=start)
    draws = iter(range(1, 2 * steps + 1))
    x = torch.zeros(2 * steps + 1, 1, 1, 1, dtype=torch.float64)
    alpha, sigma = schedule(timesteps[0])
    # From t = 1 sampling starts with noise alone, otherwise with a noisy image.
    x[0] = 1.0 if start == 1 else ((alpha * DATA_STD).square() + sigma.square()).sqrt()

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule(t)
        return alpha * DATA_STD**2 / ((alpha * DATA_STD).square() + sigma.square()) * x_t

    def noise(x_t: Tensor) -> Tensor:
        draw = torch.zeros_like(x_t)
        draw[next(draws)] = 1.0
        return draw

    x0 = sampler(denoise, x, schedule, timesteps, noise=noise)
    return x0.square().sum().sqrt().item() / DATA_STD


def format_overshoot_warning(
    sampler: Sampler, schedule: Schedule, steps: int, *, start: float = 1.0
) -> str | None:
    """A line if the sampler overshoots by more than MAX_OVERSHOOT, else None."""
    ratio = measure_overshoot(sampler, schedule, steps, start=start)
    if ratio <= MAX_OVERSHOOT:
        return None
    other = "" if sampler.spacing == "trailing" else " or sampler.spacing=trailing"
    return (
        f"this sampler overshoots in {steps} steps with spacing={sampler.spacing}: normal data of "
        f"deviation {DATA_STD} gets {ratio * DATA_STD:.2f}. Take more steps{other}"
    )
