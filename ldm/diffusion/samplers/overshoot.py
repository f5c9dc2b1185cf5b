"""What a sampler makes of data whose denoiser is known, for a word before it makes it of others.

A solver that goes on in a straight line from what it saw overshoots where its last step is long:
pictures are burnt. How far depends on solver, grid, schedule and steps, so that it is measured.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ldm.diffusion.samplers.base import Sampler
from ldm.diffusion.schedules import Schedule

DATA_STD = 0.3  # of the normal data; latents have about 1 in all, and less given the words
MAX_OVERSHOOT = 1.2  # times as much deviation is worth a word


def measure_overshoot(
    sampler: Sampler, schedule: Schedule, steps: int, *, start: float = 1.0
) -> float:
    """The deviation of normal data as the sampler paints it, over its own: 1 is right.

    Exact, as all is linear here: one image follows the noise at the start, others a draw each.
    Raises ValueError where the steps make no grid.
    """
    sampler = replace(sampler, clip=None, quantile=None)
    times = sampler.times(schedule, steps, start=start)
    x = torch.zeros(steps + 1, 1, 1, 1, dtype=torch.float64)
    alpha, sigma = schedule(times[0])
    # What begins at t = 1 begins with noise alone; a picture is noised to its time.
    x[0] = 1.0 if start == 1 else ((alpha * DATA_STD).square() + sigma.square()).sqrt()
    draws = iter(range(1, steps + 1))

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule(t)
        return alpha * DATA_STD**2 / ((alpha * DATA_STD).square() + sigma.square()) * x_t

    def noise(x_t: Tensor) -> Tensor:
        drawn = torch.zeros_like(x_t)
        drawn[next(draws)] = 1.0
        return drawn

    return sampler(denoise, x, schedule, times, noise=noise).square().sum().sqrt().item() / DATA_STD


def format_overshoot_warning(
    sampler: Sampler, schedule: Schedule, steps: int, *, start: float = 1.0
) -> str | None:
    """A line where the sampler paints with far too much contrast; None elsewhere.

    Raises ValueError where the steps make no grid.
    """
    found = measure_overshoot(sampler, schedule, steps, start=start)
    if found <= MAX_OVERSHOOT:
        return None
    other = "" if sampler.spacing == "trailing" else " or sampler.spacing=trailing"
    return (
        f"this sampler overshoots in {steps} steps with spacing={sampler.spacing}: normal data of "
        f"deviation {DATA_STD} gets {found * DATA_STD:.2f}. Take more steps{other}"
    )
