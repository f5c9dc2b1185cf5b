"""Time grids: at which noise levels a sampler asks the network.

`trailing`, `leading` and `linspace` are even in t and the schedule's own. The others are even in a
function of the noise-to-signal ratio r = sigma / alpha, so that they place the same noise levels on
any schedule, between the points of a table too: the level and what the network is told then agree.
"""

import math

import torch
from torch import Tensor

from ldm.diffusion.schedules import Schedule

LINEAR_SPACINGS = ("trailing", "leading", "linspace")
RHO = 7  # Karras et al. 2022, appendix D.1

# spacing: (the function of r in which the grid is even, its inverse)
SPACING_TRANSFORMS = {
    "karras": (lambda r: r ** (1 / RHO), lambda u: u**RHO),  # Karras et al. 2022, equation 5
    "logsnr": (torch.log, torch.exp),  # Lu et al. 2022 (DPM-Solver), section 3.3
    "ays": (torch.atan, torch.tan),
}
SPACINGS = (*LINEAR_SPACINGS, *SPACING_TRANSFORMS)

# EDM's sigma_min and sigma_max (Karras et al. 2022, table 1: 0.002 and 80 for data of standard
# deviation 0.5) for data of unit variance: beyond them the network's answer no longer changes.
MIN_NOISE_RATIO, MAX_NOISE_RATIO = 0.004, 160.0


def space_timesteps(
    schedule: Schedule, steps: int, *, start: float = 1.0, spacing: str = "trailing"
) -> Tensor:
    """The sampling grid (steps + 1,), in float64 on the CPU, falling from `start` to 0.

    `karras` is EDM's, `logsnr` even in log(alpha / sigma), both from the noisiest level to the
    cleanest of the schedule, then 0. `ays` is even in the angle atan(r), down to 0. Normal data of
    unit variance comes out of DDIM scaled by the product of the cosines of its angle steps, so that
    no other grid has a smaller error: it is what Align Your Steps arrives at where no network need
    be asked (Sabour et al. 2024, arXiv:2404.14507, section 3). Where alpha = cos and sigma = sin of
    t, it is `trailing`.
    Raises ValueError for an unknown spacing, or steps or start that make no grid.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing '{spacing}' is none of {', '.join(SPACINGS)}")
    if spacing in LINEAR_SPACINGS:
        return schedule.times(steps, start=start, spacing=spacing)
    if steps < 1 or not 0 < start <= 1:
        raise ValueError(f"a grid needs steps >= 1 and 0 < start <= 1, not {steps} and {start}")
    scale, unscale = SPACING_TRANSFORMS[spacing]
    first = 1 / schedule.steps
    below = start - first  # where there is no signal at all at the start, r is taken from here
    ends = torch.tensor([start, max(below, first), first], dtype=torch.float64)
    noisiest, next_to_it, cleanest = noise_to_signal_ratio(schedule, ends).tolist()
    noisiest = min(noisiest if math.isfinite(noisiest) else next_to_it, MAX_NOISE_RATIO)
    last, points = (0.0, steps + 1) if spacing == "ays" else (max(cleanest, MIN_NOISE_RATIO), steps)
    high, low = scale(torch.tensor([noisiest, last], dtype=torch.float64)).tolist()
    even = torch.linspace(high, low, points, dtype=torch.float64)[:steps]
    t = find_timesteps_at_ratio(schedule, unscale(even))
    t[0] = start
    grid = torch.cat([t, torch.zeros(1, dtype=torch.float64)])
    if not bool((grid.diff() < 0).all()):
        raise ValueError(
            f"{steps} sampling steps from t = {start} with spacing '{spacing}' do not fit the "
            "schedule: take fewer steps, or a noisier start (strength)"
        )
    return grid


def noise_to_signal_ratio(schedule: Schedule, t: Tensor) -> Tensor:
    """r = sigma / alpha at `t`: the noise level as EDM counts it, +inf where alpha is 0."""
    alpha, sigma = schedule(t)
    return sigma / alpha


def find_timesteps_at_ratio(schedule: Schedule, r: Tensor) -> Tensor:
    """The times in [0, 1] at which sigma / alpha is `r`, in float64; the nearest where none is."""
    low, high = torch.zeros_like(r), torch.ones_like(r)
    for _ in range(60):  # halves of an interval: exact in double precision on any schedule
        middle = (low + high) / 2
        noisier = noise_to_signal_ratio(schedule, middle) > r
        low, high = torch.where(noisier, low, middle), torch.where(noisier, middle, high)
    return torch.where(r > 0, high, 0)
