"""Super-resolution: a picture from a smaller one.

Shapes: B batch, C latent channels, E extra channels, H W pixels, h w latent grid.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.rng import Generators, derive_generators, rand, randn
from ldm.diffusion.samplers.base import Noise
from ldm.diffusion.schedules import Schedule, expand_dims_like
from ldm.diffusion.tasks.base import BaseTask, Encode, Request, Start


class SuperResolution(BaseTask):
    """A picture `scale` times as wide, by a network that is shown the small one.

    Extra channels: the latents of the small picture, enlarged smoothly and with some noise; how
    much noise, 0 to 1; and log2(scale) - 1. Noise hides from the network what a small picture
    of other origin, such as another model, has wrong (Ho et al. 2022, Cascaded Diffusion Models,
    arXiv:2106.15282, section 4.2; Saharia et al. 2022, Imagen, arXiv:2205.11487, section 2.3).

    What is learnt is not the picture but what the small one lacks, so that a network of few
    features need not carry it through (Li et al. 2022, SRDiff, arXiv:2104.14951, section 3.2).

    scales: the factors of training, one drawn for each image. scale: the factor of sampling.
    max_noise_level: the largest share of noise on the small image in training; noise_level: the
    share in sampling. tile_overlap: the share of a window that overlaps the next one, for images
    larger than those of training. residual_std: the standard deviation of the difference between
    large and small image, in the units of latents, by which it is divided.
    Raises ValueError for shares outside 0 to 1, a `scale` that is none of `scales`, and a
    `residual_std` of 0 or less.
    """

    name = "superres"
    needs_image = True

    def __init__(
        self,
        *,
        scales: Sequence[int] = (2, 4),
        scale: int = 2,
        max_noise_level: float = 0.3,
        noise_level: float = 0.0,
        tile_overlap: float = 0.25,
        residual_std: float = 0.1,
    ) -> None:
        if not scales or any(each < 2 for each in scales):
            raise ValueError(f"task.scales={list(scales)}: each is 2 or more")
        if scale not in scales:
            raise ValueError(f"task.scale={scale} is none of task.scales={list(scales)}")
        shares = {"max_noise_level": max_noise_level, "noise_level": noise_level}
        for what, share in {**shares, "tile_overlap": tile_overlap}.items():
            if not 0 <= share < 1:
                raise ValueError(f"task.{what}={share} is a share: from 0 to below 1")
        if not residual_std > 0:
            raise ValueError(f"task.residual_std={residual_std} is a standard deviation: above 0")
        self.scales, self.scale, self.residual_std = tuple(scales), scale, residual_std
        self.max_noise_level, self.noise_level = max_noise_level, noise_level
        self.tile_overlap = tile_overlap

    def extra_channels(self, channels: int) -> int:
        """C + 2."""
        return channels + 2

    def incompatible_with(self, trained: object) -> str | None:
        """It takes a network of this task that was trained for the scale."""
        if not isinstance(trained, SuperResolution):
            return "the network was never shown a small picture"
        if self.scale not in trained.scales:
            return f"task.scale={self.scale}, and it was trained for {list(trained.scales)}"
        if self.residual_std != trained.residual_std:
            return f"it was trained with task.residual_std={trained.residual_std}"
        return None

    def check_size(self, size: int) -> None:
        """ValueError where it cannot be made smaller by all of `scales`."""
        if wrong := [scale for scale in self.scales if size % scale]:
            raise ValueError(
                f"task.scales={list(self.scales)}: pictures of data.size={size} cannot be shrunk "
                f"{wrong[0]} times, which does not divide it"
            )

    def example_inputs(self, images: Tensor, *, generator: Generators) -> dict[str, Tensor]:
        """The pictures `scale` times smaller."""
        return {"image": downsample_images(images, self.scale)}

    def training_pair(
        self, latents: Tensor, images: Tensor, encode: Encode, *, generator: Generators
    ) -> tuple[Tensor, Tensor]:
        """What each picture lacks once one of `scales` made it smaller, and (B, C + 2, h, w)."""
        small, level, scale = self._random_small_images(images, generator)
        x0 = encode(small)  # (B, C, h, w)
        noise = randn(latents.shape, derive_generators(generator, "small"), device=latents.device)
        concat = self._conditioning_channels(
            x0, noise.to(latents), self.max_noise_level * level, scale
        )
        return (latents - x0) / self.residual_std, concat

    def training_concat(
        self, latents: Tensor, images: Tensor, encode: Encode, *, generator: Generators
    ) -> Tensor:
        """The second of `train_pair`."""
        return self.training_pair(latents, images, encode, generator=generator)[1]

    def start(self, request: Request, encode: Encode, schedule: Schedule, *, noise: Noise) -> Start:
        """Noise of unit variance at t = 1, and the enlarged picture.

        Raises ValueError without a picture, with a mask, or with a strength below 1.
        """
        if request.image is None or request.mask is not None or request.strength != 1:
            raise ValueError("task=superres takes a small image, no mask and no strength")
        x0 = encode(upsample_images(request.image, self.scale))  # (B, C, h, w)
        like = x0.new_ones(len(x0))
        concat = self._conditioning_channels(
            x0, noise(x0), self.noise_level * like, self.scale * like
        )

        def whole(lacking: Tensor) -> Tensor:
            return x0 + self.residual_std * lacking

        return Start(x=noise(request.latents), t=1.0, concat=concat, latents=whole)

    def _random_small_images(
        self, images: Tensor, generator: Generators
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Enlarged small pictures (B, 3, H, W), numbers for the level, and scales, (B,) each."""
        choice, level = rand((len(images), 2), generator, device=images.device).float().unbind(1)
        choice = (choice * len(self.scales)).long()  # (B,)
        small = torch.empty_like(images)
        for i, scale in enumerate(self.scales):
            small = torch.where(
                expand_dims_like(choice == i, images), degrade_images(images, scale), small
            )
        return small, level, torch.tensor(self.scales, device=images.device)[choice]

    def _conditioning_channels(
        self, x0: Tensor, noise: Tensor, level: Tensor, scale: Tensor
    ) -> Tensor:
        """(B, C + 2, h, w); level and scale (B,)."""
        share = expand_dims_like(level.to(x0), x0)
        noisy = (1 - share.square()).sqrt() * x0 + share * noise
        told = torch.stack([level.to(x0), scale.to(x0).log2() - 1], dim=1)  # (B, 2)
        told = told[:, :, None, None].expand(-1, -1, *x0.shape[-2:])
        return torch.cat([noisy, told], dim=1)


def downsample_images(images: Tensor, scale: int) -> Tensor:
    """Pictures (B, 3, H, W), each pixel the mean of scale x scale; ValueError where none fit."""
    if any(side % scale for side in images.shape[-2:]):
        raise ValueError(f"pictures of {tuple(images.shape[-2:])} cannot be shrunk {scale} times")
    return F.avg_pool2d(images, scale)


def upsample_images(images: Tensor, scale: int) -> Tensor:
    """Pictures `scale` times as wide, by a bicubic that stays in [-1, 1]."""
    return F.interpolate(images, scale_factor=scale, mode="bicubic").clamp(-1, 1)


def degrade_images(images: Tensor, scale: int) -> Tensor:
    """What is left of pictures (B, 3, H, W) that were shrunk and enlarged."""
    return upsample_images(downsample_images(images, scale), scale)
