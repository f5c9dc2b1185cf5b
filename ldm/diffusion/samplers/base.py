"""Samplers: from noise to data with a denoiser, by one update rule.

    x_s = (sigma_s / sigma_t) x_t + (alpha_s - alpha_t sigma_s / sigma_t) d

Samplers differ in `d`, in the part of the noise that is drawn afresh, and in the grid of times.
A sampler holds nothing but its settings; all it sees is `denoise`, a schedule and a grid. What it
knows by the name of another is one class: DDIM with eta = 0 is Euler's method in sigma / alpha
(k-diffusion's euler), and in t on the Flow schedule; with eta = 1 it is DDPM's ancestral sampling
and k-diffusion's euler_ancestral. Shapes: B batch, C latent channels, h w latent grid.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.guidance.base import Denoise
from ldm.diffusion.samplers.spacing import SPACINGS, space_timesteps
from ldm.diffusion.schedules import Schedule

Noise = Callable[[Tensor], Tensor]  # like torch.randn_like
OnStep = Callable[[int, Tensor], None]  # step number from 0, x0_hat
NoiseLevel = tuple[float, float]  # (alpha, sigma) at one time
StepIterator = Iterator[tuple[Tensor, Tensor]]  # after each step: x_s and the step's x0_hat


def take_step(
    x_t: Tensor,
    d: Tensor,
    now: NoiseLevel,
    then: NoiseLevel,
    *,
    up: float = 0.0,
    z: Tensor | None = None,
) -> Tensor:
    """x_s from x_t along the data estimate `d`: the only update there is.

    `up` is the part of sigma_s that is fresh noise `z` (Song et al. 2021, DDIM, equation 12).
    """
    ratio = sigma_ratio(now, then, up=up)
    x_s = ratio * x_t + (then[0] - now[0] * ratio) * d
    return x_s if z is None else x_s + up * z


def sigma_ratio(now: NoiseLevel, then: NoiseLevel, *, up: float = 0.0) -> float:
    """The part of x_t that stays in x_s: sigma_s without its fresh part `up`, over sigma_t."""
    return math.sqrt(max(then[1] ** 2 - up**2, 0.0)) / now[1]


def posterior_std(now: NoiseLevel, then: NoiseLevel) -> float:
    """Standard deviation of x_s given x_t and x0 (Ho et al. 2020, equation 7, any schedule)."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = now, then
    added = sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2  # variance that t has over s
    return sigma_s / sigma_t * math.sqrt(max(added, 0.0))


def check_eta(eta: float) -> None:
    """Raise ValueError for a part of the posterior's noise that is none."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta goes from 0 (no fresh noise) to 1 (ancestral), not {eta}")


def compute_noise_levels(schedule: Schedule, timesteps: Tensor) -> list[NoiseLevel]:
    """(alpha, sigma) at each time, as plain numbers: no step has to wait for the device."""
    return list(zip(*(part.tolist() for part in schedule(timesteps.double().cpu())), strict=True))


@dataclass(frozen=True)
class Trajectory:
    """One way from noise to data: what a sampler has while it goes."""

    estimate: Denoise  # x_t, t -> x0_hat, within its bounds
    schedule: Schedule
    times: Tensor  # (steps + 1,) on the host, where guidance may look at them without waiting
    noise_levels: list[NoiseLevel]  # the same places, as plain numbers
    noise: Noise

    def x0_hat(self, x: Tensor, i: int) -> Tensor:
        """What the denoiser makes of `x` at the i-th time."""
        return self.estimate(x, self.times[i])


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """What all samplers share: the grid, the bounds of x0_hat and the report of each step.

    spacing: which times, a name from grids.SPACINGS. clip: x0_hat is cut to [-clip, clip] at each
    step (Ho et al. 2020). quantile: with it, an image's bound is that quantile of its |x0_hat|
    where it is above `clip`, and what is cut is scaled down to [-clip, clip]: dynamic thresholding
    (Saharia et al. 2022, Imagen, section 2.3), which large guidance needs where pixels have bounds.
    Raises ValueError for settings that mean nothing.
    """

    spacing: str = "trailing"
    clip: float | None = None
    quantile: float | None = None

    def __post_init__(self) -> None:
        if self.spacing not in SPACINGS:
            raise ValueError(f"spacing '{self.spacing}' is none of {', '.join(SPACINGS)}")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip must be above 0, or null for no bound, not {self.clip}")
        if self.quantile is not None and (self.clip is None or not 0 < self.quantile <= 1):
            raise ValueError(
                f"quantile={self.quantile} with clip={self.clip}: dynamic thresholding needs "
                "a quantile above 0 and up to 1, and a clip: the range that latents are scaled to"
            )

    def times(self, schedule: Schedule, steps: int, *, start: float = 1.0) -> Tensor:
        """The sampler's own grid (steps + 1,), in float64 on the CPU, falling from `start` to 0."""
        return space_timesteps(schedule, steps, start=start, spacing=self.spacing)

    def for_single_step(self, steps: int) -> "Sampler":
        """The sampler for one step of as many, gone alone."""
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
        """x0 from x (B, C, h, w) at times[0]; `times` falls, to 0 as a rule.

        `noise` is called where a sampler draws afresh, once a step. `on_step` sees each x0_hat.
        """
        path = Trajectory(
            lambda x_t, t: clip_x0_hat(denoise(x_t, t), self.clip, self.quantile),
            schedule,
            timesteps,
            compute_noise_levels(schedule, timesteps),
            noise,
        )
        x_s = x
        for i, (x_s, x0_hat) in enumerate(self.walk(x, path)):  # noqa: B007 (the last one counts)
            if on_step is not None:
                on_step(i, x0_hat)
        return x_s

    @abstractmethod
    def walk(self, x: Tensor, path: Trajectory) -> StepIterator:
        """From `x` along the path, step by step."""


def clip_x0_hat(x0_hat: Tensor, clip: float | None, quantile: float | None) -> Tensor:
    """x0_hat (B, ...) within [-clip, clip], by cutting or by dynamic thresholding."""
    if clip is None:
        return x0_hat
    if quantile is None:
        return x0_hat.clamp(-clip, clip)
    size = x0_hat.flatten(1).abs().float() if x0_hat.dtype.itemsize < 4 else x0_hat.flatten(1).abs()
    bound = torch.quantile(size, quantile, dim=1).clamp(min=clip).to(x0_hat.dtype)  # (B,)
    bound = bound.reshape(-1, *[1] * (x0_hat.ndim - 1))
    return x0_hat.clamp(-bound, bound) * (clip / bound)


@dataclass(frozen=True, kw_only=True)
class DDIMSampler(Sampler):
    """d = x0_hat; `eta` goes from the ODE (0, DDIM) to the posterior's own noise (1, DDPM).

    With eta = 1 this is ancestral sampling (Ho et al. 2020, algorithm 2, with the smaller of their
    two variances), on any grid; with eta = 0 on the Flow schedule it is Euler's method.
    Raises ValueError for an eta outside 0 to 1.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_eta(self.eta)

    def walk(self, x: Tensor, path: Trajectory) -> StepIterator:
        for i, (now, then) in enumerate(pairwise(path.noise_levels)):
            x0_hat = path.x0_hat(x, i)
            up = self.eta * posterior_std(now, then)
            x = take_step(x, x0_hat, now, then, up=up, z=path.noise(x) if up > 0 else None)
            yield x, x0_hat


@dataclass(frozen=True, kw_only=True)
class ConsistencySampler(Sampler):
    """For networks distilled to answer in a few steps: d = x0_hat, and all noise drawn afresh.

    Multistep consistency sampling (Song et al. 2023, arXiv:2303.01469, algorithm 1; Luo et al.
    2023, LCM, algorithm 3), exact where x0_hat is where the ODE ends. `original_steps`: how
    many even timesteps the network was distilled at, 50 for LCMs: the grid keeps to them. None:
    any timestep. Raises ValueError where `original_steps` is below 1.
    """

    original_steps: int | None = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.original_steps is not None and self.original_steps < 1:
            raise ValueError(
                f"original_steps must be 1 or more, or null for any time, not {self.original_steps}"
            )

    def times(self, schedule: Schedule, steps: int, *, start: float = 1.0) -> Tensor:
        """As for all samplers; with `original_steps`, `trailing` steps on its grid."""
        grid = super().times(schedule, steps, start=start)
        if self.original_steps is None:
            return grid
        left = math.floor(start * self.original_steps + 1e-6)  # of its times, up to the start
        if self.spacing != "trailing" or steps > left:
            raise ValueError(
                f"{steps} {self.spacing} steps from t = {start} for a network that was distilled "
                f"at {self.original_steps} even times: take fewer steps, sampler.spacing=trailing, "
                "or sampler.original_steps=null where it knows all times"
            )
        grid[1:-1] = (
            left - (torch.arange(1, steps) * left).div(steps).floor()
        ) / self.original_steps
        return grid

    def walk(self, x: Tensor, path: Trajectory) -> StepIterator:
        for i, (now, then) in enumerate(pairwise(path.noise_levels)):
            x0_hat = path.x0_hat(x, i)
            up = then[1]
            x = take_step(x, x0_hat, now, then, up=up, z=path.noise(x) if up > 0 else None)
            yield x, x0_hat
