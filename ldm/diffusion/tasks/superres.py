"""Super-resolution: an image from a smaller one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.rng import Generators, derive_generators, rand, randn
from ldm.diffusion.samplers.base import Noise
from ldm.diffusion.schedules import Schedule, expand_dims_like
from ldm.diffusion.tasks.base import Encode, Request, Start, Task
from ldm.utils.transfer import send


@dataclass(frozen=True, kw_only=True)
class SuperResolution(Task):
    """An image `scale` times as wide, by a network with the small image as input.

    Extra channels: the latents of the small image, enlarged smoothly and with some noise, which
    hides the errors of generated images (Ho et al. 2022, Cascaded Diffusion Models,
    arXiv:2106.15282, section 4.2); the level of that noise, 0 to 1; and log2(scale) - 1.
    The network learns the difference from the small image (Li et al. 2022, SRDiff,
    arXiv:2104.14951, section 3.2).
    """

    name = "superres"
    needs_image = True
    scales: Sequence[int] = (2, 4)  # of training, a random one for each image
    scale: int = 2  # of sampling
    max_noise_level: float = 0.3  # in training
    noise_level: float = 0.0  # in sampling
    tile_overlap: float = 0.25  # the share of a window that overlaps the next one
    residual_std: float = 0.1  # of the difference, in units of the latents, which it divides

    def __post_init__(self) -> None:
        scales = list(self.scales)
        if not scales or any(each < 2 for each in scales):
            raise ValueError(f"task.scales={scales}: each is 2 or more")
        if self.scale not in scales:
            raise ValueError(f"task.scale={self.scale} is none of task.scales={scales}")
        for name in ("max_noise_level", "noise_level", "tile_overlap"):
            if not 0 <= (share := getattr(self, name)) < 1:
                raise ValueError(f"task.{name}={share} is a share: from 0 to below 1")
        if not self.residual_std > 0:
            raise ValueError(
                f"task.residual_std={self.residual_std} is a standard deviation: above 0"
            )

    def extra_channels(self, channels: int) -> int:
        return channels + 2

    def incompatible_with(self, trained: Any) -> str | None:
        if trained.name != self.name:
            return "the network was not trained with small images"
        if self.scale not in trained.scales:
            return f"task.scale={self.scale}, and it was trained for {list(trained.scales)}"
        if self.residual_std != trained.residual_std:
            return f"it was trained with task.residual_std={trained.residual_std}"
        return None

    def check_size(self, size: int) -> None:
        if wrong := [scale for scale in self.scales if size % scale]:
            raise ValueError(
                f"task.scales={list(self.scales)}: images of data.size={size} cannot be shrunk "
                f"{wrong[0]} times, which does not divide it"
            )

    def example_inputs(self, images: Tensor, *, generator: Generators) -> dict[str, Tensor]:
        return {"image": downsample_images(images, self.scale)}

    def training_pair(
        self, latents: Tensor, images: Tensor, encode: Encode, *, generator: Generators
    ) -> tuple[Tensor, Tensor]:
        """The difference from the image at one of `scales`, and channels (B, C + 2, h, w)."""
        choice, level = rand((len(images), 2), generator, device=images.device).float().unbind(1)
        choice = (choice * len(self.scales)).long()  # (B,)
        small = torch.empty_like(images)
        for i, scale in enumerate(self.scales):
            enlarged = upsample_images(downsample_images(images, scale), scale)
            small = torch.where(expand_dims_like(choice == i, images), enlarged, small)
        scale = send(torch.tensor(list(self.scales)), images.device)[choice]  # (B,)
        x0 = encode(small)  # (B, C, h, w)
        noise = randn(latents.shape, derive_generators(generator, "small"), device=latents.device)
        concat = add_noise_channels(x0, noise.to(latents), self.max_noise_level * level, scale)
        return (latents - x0) / self.residual_std, concat

    def start(self, request: Request, encode: Encode, schedule: Schedule, *, noise: Noise) -> Start:
        if request.image is None or request.mask is not None or request.strength != 1:
            raise ValueError("task=superres takes a small image, no mask and no strength")
        x0 = encode(upsample_images(request.image, self.scale))  # (B, C, h, w)
        ones = x0.new_ones(len(x0))
        concat = add_noise_channels(x0, noise(x0), self.noise_level * ones, self.scale * ones)
        return Start(
            x=request.noise_scale * noise(request.latents),
            t=1.0,
            concat=concat,
            to_latents=lambda residual: x0 + self.residual_std * residual,
        )


def add_noise_channels(x0: Tensor, noise: Tensor, level: Tensor, scale: Tensor) -> Tensor:
    """The extra channels (B, C + 2, h, w); level and scale (B,)."""
    share = expand_dims_like(level.to(x0), x0)
    noisy = (1 - share.square()).sqrt() * x0 + share * noise
    numbers = torch.stack([level.to(x0), scale.to(x0).log2() - 1], dim=1)  # (B, 2)
    numbers = numbers[:, :, None, None].expand(-1, -1, *x0.shape[-2:])
    return torch.cat([noisy, numbers], dim=1)


def downsample_images(images: Tensor, scale: int) -> Tensor:
    """Images (B, 3, H, W), each pixel the mean of scale x scale; ValueError if they do not fit."""
    if any(side % scale for side in images.shape[-2:]):
        raise ValueError(f"images of {tuple(images.shape[-2:])} cannot be shrunk {scale} times")
    return F.avg_pool2d(images, scale)


def upsample_images(images: Tensor, scale: int) -> Tensor:
    """Images `scale` times as wide, bicubic, clamped to [-1, 1]."""
    return F.interpolate(images, scale_factor=scale, mode="bicubic").clamp(-1, 1)
