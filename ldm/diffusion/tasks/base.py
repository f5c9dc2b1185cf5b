"""The interface of tasks: extra inputs of the network, and the start of sampling."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm.diffusion.rng import Generators
from ldm.diffusion.samplers.base import Noise, compute_noise_levels
from ldm.diffusion.schedules import Schedule

Encode = Callable[[Tensor], Tensor]  # images (B, 3, H, W) in [-1, 1] -> latents (B, C, h, w)
Invert = Callable[[Tensor, float], Tensor]  # latents (B, C, h, w) at 0, t -> latents at t


@dataclass(frozen=True)
class Request:
    """The user's wishes: the shape of the latents, and the image and mask of some tasks."""

    latents: Tensor  # (B, C, h, w), empty: their shape, type and device
    image: Tensor | None = None  # (B, 3, H, W) in [-1, 1]
    mask: Tensor | None = None  # (B, 1, H, W), 1 where the image is replaced
    strength: float = 1.0  # the time at which sampling starts; at 1 nothing of the image is left
    invert: Invert | None = None  # by the model (DDIM inversion)
    first_timestep: Callable[[float], float] = float  # strength -> the sampler's first time
    noise_scale: float = 1.0  # standard deviation of pure noise, of the sampler


@dataclass(frozen=True)
class Start:
    """The start of sampling, and what a task does to each x0_hat (B, C, h, w)."""

    x: Tensor  # (B, C, h, w), at the first time of the timesteps that start at `t`
    t: float
    concat: Tensor | None = None  # (B, E, h, w), extra channels of the network
    project: Callable[[Tensor], Tensor] = lambda x0_hat: x0_hat  # puts in the known part
    restore: bool = True  # whether the result is the image where the mask is 0
    rounds: int = 1  # how often each step is taken, with fresh noise in between
    to_latents: Callable[[Tensor], Tensor] = lambda x0_hat: x0_hat  # where it predicts others


class Task(Protocol):
    """A task; the defaults are those of a network without extra channels."""

    name: str  # the option of conf/task
    needs_image: bool = False  # it cannot sample without one
    sampling_only: bool = False  # no network is trained for it
    is_video: bool = False
    scale: int = 1  # the width of the result / that of the input image
    default_strength: float = 1.0
    rounds: int = 1  # how often each step is taken
    tile_overlap: float | None = None  # of windows, as a share; None: any size in one piece

    def extra_channels(self, channels: int) -> int:
        """E for latents of `channels`."""
        return 0

    def incompatible_with(self, trained: Any) -> str | None:
        """Returns why a network of the task `trained` cannot do this one; None if it can."""
        if trained.extra_channels(1):
            return f"a network of task={trained.name} takes more inputs than noise"
        return None

    def check_size(self, size: int) -> None:
        """Raises ValueError if it cannot be trained on squares of `size` pixels."""
        return

    def example_inputs(self, images: Tensor, *, generator: Generators) -> dict[str, Tensor]:
        """The image and mask of a request, made of real images (B, 3, H, W)."""
        return {}

    def shape_noise(self, eps: Tensor) -> Tensor:
        """The noise of training and sampling, made of white noise."""
        return eps

    def training_pair(
        self, latents: Tensor, images: Tensor, encode: Encode, *, generator: Generators
    ) -> tuple[Tensor, Tensor | None]:
        """The x0 (B, C, h, w) of a training batch, and its extra channels (B, E, h, w)."""
        return latents, None

    def start(self, request: Request, encode: Encode, schedule: Schedule, *, noise: Noise) -> Start:
        """Returns the start of sampling; ValueError if the request does not fit the task."""


def add_noise_at_strength(x0: Tensor, request: Request, schedule: Schedule, noise: Noise) -> Tensor:
    """x_t (B, C, h, w) of x0 at the sampler's first time."""
    check_strength(request.strength)
    t = torch.tensor([request.first_timestep(request.strength)], dtype=torch.float64)
    ((alpha, sigma),) = compute_noise_levels(schedule, t)
    return alpha * x0 + sigma * noise(x0)


def check_strength(t: float) -> None:
    """ValueError unless above 0 and up to 1."""
    if not 0 < t <= 1:
        raise ValueError(f"strength={t} must be above 0 (nothing changes) and up to 1 (all)")
