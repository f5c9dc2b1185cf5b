"""Inpainting: new pixels where a mask is 1."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.rng import Generators
from ldm.diffusion.samplers.base import Noise
from ldm.diffusion.schedules import Schedule
from ldm.diffusion.tasks.base import Encode, Request, Start, Task, add_noise_at_strength
from ldm.diffusion.tasks.masks import random_masks


@dataclass(frozen=True, kw_only=True)
class ProjectedInpainting(Task):
    """Inpainting by any text-to-image model: each x0_hat gets the known latents back.

    rounds: above 1 each step is taken again, with fresh noise (Lugmayr et al. 2022, RePaint,
    arXiv:2201.09865, algorithm 1), so that the generated part comes to fit the known part.
    """

    name = "inpaint_projected"
    sampling_only = True
    rounds: int = 1

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"task.rounds={self.rounds}: each step is taken once or more")

    def start(self, request: Request, encode: Encode, schedule: Schedule, *, noise: Noise) -> Start:
        known, project = project_known(request, encode, task=self)
        x = add_noise_at_strength(known, request, schedule, noise)
        return Start(x=x, t=request.strength, project=project, rounds=self.rounds)


@dataclass(frozen=True, kw_only=True)
class Inpainting(Task):
    """Inpainting by a network with the mask and the rest of the image as inputs.

    Extra channels, as in Stable Diffusion's inpainting network: the mask on the latent grid, then
    the latents of the image, grey where it is masked (Rombach et al. 2022, section 4.5).
    mask_resize: in the network's input a cell of the grid is masked if any of its pixels is (`max`)
    or if its first pixel is (`nearest`, as diffusers does). restore: each x0_hat gets the known
    latents back, which diffusers does not do with such a network.
    """

    name = "inpaint"
    needs_image = True
    mask_resize: str = "max"
    restore: bool = True

    def __post_init__(self) -> None:
        if self.mask_resize not in ("max", "nearest"):
            raise ValueError(f"task.mask_resize={self.mask_resize} is neither max nor nearest")

    def extra_channels(self, channels: int) -> int:
        return 1 + channels

    def incompatible_with(self, trained: Task) -> str | None:
        return None if trained.name == self.name else "the network was not trained with masks"

    def example_inputs(self, images: Tensor, *, generator: Generators) -> dict[str, Tensor]:
        return {"image": images, "mask": random_masks(images, generator=generator)}

    def training_pair(
        self, latents: Tensor, images: Tensor, encode: Encode, *, generator: Generators
    ) -> tuple[Tensor, Tensor]:
        """The latents, and random masks with the latents of the rest, (B, 1 + C, h, w)."""
        mask = random_masks(images, generator=generator)
        return latents, self._mask_channels(images, mask, encode, like=latents)

    def start(self, request: Request, encode: Encode, schedule: Schedule, *, noise: Noise) -> Start:
        known, project = project_known(request, encode, task=self)
        concat = self._mask_channels(request.image, request.mask, encode, like=request.latents)
        if request.strength == 1 and not self.restore:
            x = request.noise_scale * noise(request.latents)
        else:
            x = add_noise_at_strength(known, request, schedule, noise)
        start = Start(x=x, t=request.strength, concat=concat, restore=self.restore)
        return replace(start, project=project) if self.restore else start

    def _mask_channels(
        self, images: Tensor, mask: Tensor, encode: Encode, *, like: Tensor
    ) -> Tensor:
        """(B, 1 + C, h, w): the mask (B, 1, H, W) on the grid of `like`, and the rest's latents."""
        rest = encode(torch.where(mask > 0, 0.0, images))
        if self.mask_resize == "max":
            small = downsample_mask(mask, like=like)
        else:
            small = F.interpolate(mask, like.shape[-2:], mode="nearest")
        return torch.cat([small.to(rest), rest], dim=1)


def project_known(
    request: Request, encode: Encode, *, task: Task
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The latents of the image, and the function that puts the known ones into an x0_hat."""
    if request.image is None or request.mask is None:
        raise ValueError(f"task={task.name} takes an image and a mask: image=FILE mask=FILE")
    known, hidden = encode(request.image), downsample_mask(request.mask, like=request.latents)

    def project(x0_hat: Tensor) -> Tensor:
        return torch.where(hidden > 0, x0_hat, known)

    return known, project


def downsample_mask(mask: Tensor, *, like: Tensor) -> Tensor:
    """A mask (B, 1, H, W) on the latent grid: a cell is masked if any of its pixels is."""
    return F.adaptive_max_pool2d(mask, like.shape[-2:])
