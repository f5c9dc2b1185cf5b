"""Samplers: from noise to data with a denoiser, by one update rule.

    x_s = (sigma_s / sigma_t) x_t + (alpha_s - alpha_t sigma_s / sigma_t) d            `take_step`

A sampler is a dataclass of settings with one method, `iterate`, which chooses the data estimate `d`
and how much of the noise is fresh. This one is Euler's method, or DDIM, with d = x0_hat:

    class EulerSampler(Sampler):
        def iterate(self, x: Tensor, path: Trajectory) -> StepIterator:
            for i, (now, then) in enumerate(pairwise(path.noise_levels)):
                x0_hat = path.x0_hat(x, i)              # the denoiser at path.timesteps[i]
                x = take_step(x, x0_hat, now, then)     # from noise level `now` to `then`
                yield x, x0_hat
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from ldm.diffusion.guidance.base import Denoise
from ldm.diffusion.samplers.spacing import (
    LINEAR_SPACINGS,
    check_spacing,
    find_network_timestep,
    space_timesteps,
)
from ldm.diffusion.schedules import Schedule, expand_dims_like

Noise = Callable[[Tensor], Tensor]  # like torch.randn_like
OnStep = Callable[[int, Tensor], None]  # step number from 0, x0_hat
NoiseLevel = tuple[float, float]  # (alpha, sigma) at one time
StepIterator = Iterator[tuple[Tensor, Tensor]]  # after each step: x_s and the step's x0_hat


@dataclass(frozen=True)
class Trajectory:
    """One sampling process: what a sampler needs besides its own settings."""

    estimate: Denoise  # x_t, t -> x0_hat, within its bounds
    schedule: Schedule
    timesteps: Tensor  # (steps + 1,), float64 on the CPU, where reading them waits for no device
    noise_levels: list[NoiseLevel]  # the same times
    noise: Noise

    def x0_hat(self, x: Tensor, i: int) -> Tensor:
        """The denoiser's x0_hat of `x` at the i-th time."""
        return self.estimate(x, self.timesteps[i])


def compute_noise_levels(schedule: Schedule, timesteps: Tensor) -> list[NoiseLevel]:
    """(alpha, sigma) at each time, as plain numbers."""
    return list(zip(*(part.tolist() for part in schedule(timesteps.double().cpu())), strict=True))


def take_step(
    x_t: Tensor,
    d: Tensor,
    now: NoiseLevel,
    then: NoiseLevel,
    *,
    up: float = 0.0,
    noise: Noise | None = None,
) -> Tensor:
    """x_s from x_t and the data estimate `d`: the only update rule.

    `up` is the part of sigma_s that is fresh `noise` (Song et al. 2021, DDIM, equation 12).
    """
    ratio = sigma_ratio(now, then, up=up)
    x_s = ratio * x_t + (then[0] - now[0] * ratio) * d
    return x_s + up * noise(x_t) if up > 0 else x_s


def sigma_ratio(now: NoiseLevel, then: NoiseLevel, *, up: float = 0.0) -> float:
    """sigma_s without its fresh part `up`, over sigma_t: the factor of x_t in x_s."""
    return math.sqrt(max(then[1] ** 2 - up**2, 0.0)) / now[1]


def posterior_std(now: NoiseLevel, then: NoiseLevel) -> float:
    """Standard deviation of x_s given x_t and x0 (Ho et al. 2020, equation 7, any schedule)."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = now, then
    added = sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2  # variance that t has over s
    return sigma_s / sigma_t * math.sqrt(max(added, 0.0))


def check_eta(eta: float) -> None:
    """ValueError unless a share of the posterior's noise."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta goes from 0 (no fresh noise) to 1 (ancestral), not {eta}")


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """The common part of samplers: the timesteps, the bounds of x0_hat, the report of each step.

    spacing, offset, set_alpha_to_one, grid, ends: see `space_timesteps`. clip: x0_hat is clamped to
    [-clip, clip] (Ho et al. 2020). quantile: dynamic thresholding; an image's bound is that
    quantile of its |x0_hat| if that is above `clip`, and the result is scaled to [-clip, clip]
    (Saharia et al. 2022, Imagen, 2.3).
    """

    steps_alike: ClassVar[bool] = False  # whether it takes grid=ddim, by `pair_levels`

    spacing: str = "trailing"
    offset: int = 0
    set_alpha_to_one: bool = True
    grid: str | None = None
    ends: str = "linspace"
    clip: float | None = None
    quantile: float | None = None

    def __post_init__(self) -> None:
        check_spacing(self.spacing, offset=self.offset, grid=self.grid, ends=self.ends)
        if self.grid == "ddim" and not self.steps_alike:
            raise ValueError("sampler.grid=ddim is for sampler=ddim")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip must be above 0, or null for no bound, not {self.clip}")
        if self.quantile is not None and (self.clip is None or not 0 < self.quantile <= 1):
            raise ValueError(
                f"quantile={self.quantile} with clip={self.clip}: dynamic thresholding needs "
                "a quantile above 0 and up to 1, and a clip: the range that latents are scaled to"
            )

    def timesteps(self, schedule: Schedule, steps: int, *, start: float = 1.0) -> Tensor:
        """The times (steps + 1,), in float64 on the CPU, falling from `start` to 0."""
        return space_timesteps(
            schedule,
            steps,
            start=start,
            spacing=self.spacing,
            offset=self.offset,
            set_alpha_to_one=self.set_alpha_to_one,
            grid=self.grid,
            ends=self.ends,
        )

    def pair_levels(self, path: Trajectory) -> list[tuple[NoiseLevel, NoiseLevel]]:
        """The noise levels from and to which each step goes; all equally long with grid=ddim."""
        if self.grid != "ddim" or self.spacing == "leading":
            return list(pairwise(path.noise_levels))
        schedule, t = path.schedule, path.timesteps
        ends = t[:-1] - schedule.stride(t[0].item(), len(t) - 1)
        ends = torch.where(ends > 0.5 / schedule.steps, ends, t[-1])
        levels = compute_noise_levels(schedule, ends)
        return list(zip(path.noise_levels[:-1], levels, strict=True))

    def network_timestep(self, schedule: Schedule, t: Tensor) -> Tensor:
        """The network's input at `t`, which diffusers' grids round or interpolate."""
        return find_network_timestep(schedule, t, spacing=self.spacing, grid=self.grid)

    def noise_scale(self, schedule: Schedule, steps: int) -> float:
        """The standard deviation of the noise from which sampling starts."""
        even = self.spacing if self.spacing in LINEAR_SPACINGS else self.ends
        if self.grid != "euler" or even == "leading":
            return 1.0
        # diffusers multiplies the noise by the first r and divides by sqrt(1 + r^2).
        ((_, sigma),) = compute_noise_levels(schedule, self.timesteps(schedule, steps)[:1])
        return sigma

    def for_single_step(self, steps: int) -> "Sampler":
        """The sampler that takes one of `steps` steps on its own."""
        return self

    @torch.no_grad()
    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        schedule: Schedule,
        timesteps: Tensor,
        *,
        noise: Noise,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """x0 from x (B, C, h, w) at timesteps[0]; `timesteps` fall, usually to 0.

        `noise` is called at most twice per step. `on_step` gets each x0_hat.
        """

        def estimate(x_t: Tensor, t: Tensor) -> Tensor:
            return clip_x0_hat(denoise(x_t, t), self.clip, self.quantile)

        levels = compute_noise_levels(schedule, timesteps)
        path = Trajectory(estimate, schedule, timesteps, levels, noise)
        x_s = x
        for i, (x_s, x0_hat) in enumerate(self.iterate(x, path)):  # noqa: B007 (used afterwards)
            if on_step is not None:
                on_step(i, x0_hat)
        return x_s

    @abstractmethod
    def iterate(self, x: Tensor, path: Trajectory) -> StepIterator:
        """The steps from `x` along the path."""


def clip_x0_hat(x0_hat: Tensor, clip: float | None, quantile: float | None) -> Tensor:
    """x0_hat (B, ...) within [-clip, clip], by clamping or by dynamic thresholding."""
    if clip is None:
        return x0_hat
    if quantile is None:
        return x0_hat.clamp(-clip, clip)
    size = x0_hat.flatten(1).abs()
    size = size.to(torch.promote_types(size.dtype, torch.float32))  # as torch.quantile needs
    bound = torch.quantile(size, quantile, dim=1).clamp(min=clip).to(x0_hat.dtype)  # (B,)
    bound = expand_dims_like(bound, x0_hat)
    return x0_hat.clamp(-bound, bound) * (clip / bound)
