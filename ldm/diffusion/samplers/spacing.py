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
# Where diffusers' schedulers of a family differ from the times above:
# ddim (DDIM): each step is floor(table / steps) long, also if the next one begins elsewhere.
# euler (Euler, Euler ancestral, Heun, DPM SDE): `linspace` is not rounded to the table, and r is
#   linear in between; `karras` and `logsnr` go from the first time of `ends` to its last.
# dpm (DPM-Solver multistep, UniPC): `leading` and `linspace` are those of one step more, without
#   the last time; the network gets whole timesteps.
GRIDS = ("ddim", "euler", "dpm")
# EDM's sigma_min and sigma_max (Karras et al. 2022, table 1: 0.002 and 80 for data of standard
# deviation 0.5) for data of unit variance: beyond them the network's output no longer changes.
MIN_NOISE_RATIO, MAX_NOISE_RATIO = 0.004, 160.0


def check_spacing(
    spacing: str, *, offset: int = 0, grid: str | None = None, ends: str = "linspace"
) -> None:
    """ValueError for a name that is unknown, and for settings that do not go together."""
    if spacing not in SPACINGS:
        raise ValueError(f"spacing '{spacing}' is none of {', '.join(SPACINGS)}")
    if grid is not None and grid not in GRIDS:
        raise ValueError(f"grid '{grid}' is none of {', '.join(GRIDS)}, and null for ours")
    if ends not in LINEAR_SPACINGS:
        raise ValueError(f"ends '{ends}' is none of {', '.join(LINEAR_SPACINGS)}")
    if ends != "linspace" and not (grid == "euler" and spacing in SPACING_TRANSFORMS):
        raise ValueError(
            f"sampler.ends={ends} is read with sampler.grid=euler and sampler.spacing=karras or "
            "logsnr alone: leave it out"
        )
    absent = {"ddim": tuple(SPACING_TRANSFORMS), "euler": ("ays",), "dpm": ("ays",)}
    if grid is not None and spacing in absent[grid]:
        raise ValueError(f"sampler.grid={grid} is of diffusers, which has no spacing={spacing}")
    if offset < 0 or offset != int(offset):
        raise ValueError(f"offset is a number of training timesteps, 0 or more, not {offset}")
    has_offset = spacing == "leading" or (
        grid == "euler" and spacing in SPACING_TRANSFORMS and ends == "leading"
    )
    if offset and not has_offset:
        raise ValueError(
            f"sampler.offset={offset} moves the times of sampler.spacing=leading alone, and "
            f"spacing is {spacing}: leave it out, or take sampler.spacing=leading"
        )


def space_timesteps(
    schedule: Schedule,
    steps: int,
    *,
    start: float = 1.0,
    spacing: str = "trailing",
    offset: int = 0,
    set_alpha_to_one: bool = True,
    grid: str | None = None,
    ends: str = "linspace",
) -> Tensor:
    """The times of sampling (steps + 1,), in float64 on the CPU, falling from `start` to 0.

    offset: that many training timesteps later, for `leading` (steps_offset in diffusers).
    set_alpha_to_one: otherwise the last time is that of the first training timestep.
    grid, ends: see GRIDS. Raises ValueError for steps that do not fit start and schedule.
    """
    check_spacing(spacing, offset=offset, grid=grid, ends=ends)
    if steps < 1 or not 0 < start <= 1:
        raise ValueError(f"a grid needs steps >= 1 and 0 < start <= 1, not {steps} and {start}")
    linear = spacing in LINEAR_SPACINGS
    if grid is not None:
        t = space_as_published(schedule, steps, start, spacing, offset=offset, grid=grid, ends=ends)
    elif linear:
        t = space_linearly(schedule, steps, start, spacing, offset=offset)
    else:
        t = space_by_ratio(schedule, steps, start, spacing)
    if t[0] > 1:
        raise ValueError(
            f"sampler.offset={offset} moves the first of {steps} sampling steps beyond the "
            f"schedule of {schedule.steps}: take fewer steps, or sampler.offset=0"
        )
    last = 0.0 if set_alpha_to_one else 1 / schedule.steps
    times = torch.cat([t, torch.tensor([last], dtype=torch.float64)])
    # The first training timestep may come twice: then the last step leaves x as it is.
    if bool((t.diff() < 0).all()) and times[-2] - last >= (1e-9 if set_alpha_to_one else -1e-9):
        return times
    if not linear:
        raise ValueError(
            f"{steps} sampling steps from t = {start} with spacing '{spacing}' do not fit the "
            "schedule: take fewer steps, or a noisier start (strength)"
        )
    more = grid == "dpm" and spacing != "trailing"
    most, least = math.floor(start * schedule.steps + 1e-9) - more, steps + more
    remedies = [f"steps={most} or fewer"] if most > 0 else []
    if start < 1:
        remedies += [f"a start (strength) of {min(least / schedule.steps, 1.0):g} or more"]
    raise ValueError(
        f"{steps} sampling steps from t = {start} do not fit a schedule of {schedule.steps}: "
        f"take {', or '.join(remedies)}"
    )


def space_linearly(
    schedule: Schedule, steps: int, start: float, spacing: str, *, offset: int = 0
) -> Tensor:
    """Times (steps,) that are even in t (Lin et al. 2024, arXiv:2305.08891, table 2).

    `trailing` contains the noisiest time, `leading` the cleanest, `linspace` both. On a table
    `leading` has a whole stride, floor(table / steps), as in diffusers.
    """
    i = torch.arange(steps, dtype=torch.float64)
    first = 1 / schedule.steps
    if spacing == "trailing":
        return schedule.on_grid(start * (1 - i / steps))
    if spacing == "leading":
        t = schedule.on_grid(schedule.stride(start, steps) * (steps - 1 - i))
        return t + (1 + offset) / schedule.steps
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


def space_as_published(
    schedule: Schedule, steps: int, start: float, spacing: str, *, offset: int, grid: str, ends: str
) -> Tensor:
    """Times (steps,) of diffusers' schedulers of a family; see GRIDS."""
    even = ends if spacing in SPACING_TRANSFORMS else spacing
    noisiest, cleanest = (schedule.steps * t for t in schedule.published_ends(start))
    i = torch.arange(steps, dtype=torch.float64)
    if grid == "dpm" and spacing in SPACING_TRANSFORMS:
        t = torch.tensor([noisiest, cleanest], dtype=torch.float64) / schedule.steps
    elif even == "leading":
        points = steps + 1 if grid == "dpm" else steps
        t = space_linearly(schedule, points, start, even, offset=offset)[:steps]
    elif even == "trailing":
        # In numpy's order, which decides where halves are rounded to.
        stride = (noisiest - noisiest / steps) - noisiest
        t = schedule.round_index(noisiest + i * stride) / schedule.steps
    elif grid != "euler":
        points = (i.flip(0) + 1, steps) if grid == "dpm" else (i.flip(0), max(steps - 1, 1))
        index = points[0] * ((noisiest - cleanest) / points[1])
        t = (schedule.round_index(index) + cleanest) / schedule.steps
    else:
        t = torch.linspace(noisiest, cleanest, steps, dtype=torch.float64) / schedule.steps
    if t[0] > 1 or grid == "ddim":
        return t  # an offset that is refused; times of the table
    r = schedule.interpolate_ratio(t)
    if spacing in SPACING_TRANSFORMS:
        scale, unscale = SPACING_TRANSFORMS[spacing]
        high, low = scale(r[[0, -1]]).tolist()
        return schedule.timesteps_at_ratio(
            unscale(torch.linspace(high, low, steps, dtype=torch.float64))
        )
    # A time of the table is not changed, unless it has no signal.
    is_same = schedule.noise_to_signal_ratio(t).isclose(r, rtol=1e-12, atol=0)
    return torch.where(is_same, t, schedule.timesteps_at_ratio(r))


def find_network_timestep(
    schedule: Schedule, t: Tensor, *, spacing: str, grid: str | None
) -> Tensor:
    """The network's input at `t`, which diffusers interpolates, and rounds for grid=dpm."""
    if grid is None or grid == "ddim":
        return schedule.timestep(t)
    if grid == "euler" and spacing == "linspace":
        return schedule.interpolate_timestep(t, lambda r: r)
    timestep = schedule.interpolate_timestep(t, torch.log)
    return timestep.round() if grid == "dpm" else timestep
