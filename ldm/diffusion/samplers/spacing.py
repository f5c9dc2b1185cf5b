"""Timesteps of sampling: even in t, or in a function of the noise-to-signal ratio sigma / alpha."""

import math

import torch
from torch import Tensor

from ldm.diffusion.schedules import Schedule

LINEAR_SPACINGS = ("trailing", "leading", "linspace")
RHO = 7  # Karras et al. 2022, appendix D.1

# spacing: (the function of r in which the times are even, its inverse)
SPACING_TRANSFORMS = {
    "karras": (lambda r: r ** (1 / RHO), lambda u: u**RHO),  # Karras et al. 2022, equation 5
    "logsnr": (torch.log, torch.exp),  # Lu et al. 2022 (DPM-Solver), section 3.3
    "ays": (torch.atan, torch.tan),
}
SPACINGS = (*LINEAR_SPACINGS, *SPACING_TRANSFORMS)

# EDM's sigma_min and sigma_max (Karras et al. 2022, table 1: 0.002 and 80 for data of standard
# deviation 0.5) for data of unit variance: beyond them the network's output no longer changes.
MIN_NOISE_RATIO, MAX_NOISE_RATIO = 0.004, 160.0


def space_timesteps(
    schedule: Schedule, steps: int, *, start: float = 1.0, spacing: str = "trailing"
) -> Tensor:
    """The times of sampling (steps + 1,), in float64 on the CPU, falling from `start` to 0.

    Raises ValueError for steps that do not fit start and schedule.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing '{spacing}' is none of {', '.join(SPACINGS)}")
    if steps < 1 or not 0 < start <= 1:
        raise ValueError(f"a grid needs steps >= 1 and 0 < start <= 1, not {steps} and {start}")
    linear = spacing in LINEAR_SPACINGS
    t = (space_linearly if linear else space_by_ratio)(schedule, steps, start, spacing)
    times = torch.cat([t, torch.zeros(1, dtype=torch.float64)])
    if bool((times.diff() < 0).all()):
        return times
    if not linear:
        raise ValueError(
            f"{steps} sampling steps from t = {start} with spacing '{spacing}' do not fit the "
            "schedule: take fewer steps, or a noisier start (strength)"
        )
    most, least = math.floor(start * schedule.steps + 1e-9), min(steps / schedule.steps, 1.0)
    remedies = [f"steps={most} or fewer"] if most else []
    remedies += [f"a start (strength) of {least:g} or more"] if start < 1 else []
    raise ValueError(
        f"{steps} sampling steps from t = {start} do not fit a schedule of {schedule.steps}: "
        f"take {', or '.join(remedies)}"
    )


def space_linearly(schedule: Schedule, steps: int, start: float, spacing: str) -> Tensor:
    """Times (steps,) that are even in t (Lin et al. 2024, arXiv:2305.08891, table 2).

    `trailing` contains the noisiest time, `leading` the cleanest, `linspace` both. On a table
    `leading` has a whole stride, floor(table / steps), as in diffusers with steps_offset=0.
    """
    i = torch.arange(steps, dtype=torch.float64)
    first = 1 / schedule.steps
    if spacing == "trailing":
        return schedule.on_grid(start * (1 - i / steps))
    if spacing == "leading":
        return schedule.on_grid(schedule.stride(start, steps) * (steps - 1 - i)) + first
    return schedule.on_grid((start - first) * (1 - i / max(steps - 1, 1))) + first


def space_by_ratio(schedule: Schedule, steps: int, start: float, spacing: str) -> Tensor:
    """Times (steps,) that are even in a function of r.

    `karras` and `logsnr` go from the noisiest level of the schedule to its cleanest. `ays` is even
    in the angle atan(r), down to 0, where DDIM's error on normal data of unit variance is smallest:
    Align Your Steps (Sabour et al. 2024, arXiv:2404.14507, section 3) without a network.
    """
    scale, unscale = SPACING_TRANSFORMS[spacing]
    first = 1 / schedule.steps
    below = max(start - first, first)  # r is taken from here if there is no signal at the start
    ends = torch.tensor([start, below, first], dtype=torch.float64)
    noisiest, next_to_it, cleanest = schedule.noise_to_signal_ratio(ends).tolist()
    noisiest = min(noisiest if math.isfinite(noisiest) else next_to_it, MAX_NOISE_RATIO)
    last, points = (0.0, steps + 1) if spacing == "ays" else (max(cleanest, MIN_NOISE_RATIO), steps)
    high, low = scale(torch.tensor([noisiest, last], dtype=torch.float64)).tolist()
    even = torch.linspace(high, low, points, dtype=torch.float64)[:steps]
    t = schedule.timesteps_at_ratio(unscale(even))
    t[0] = start
    return t
