"""Text to video, or a prompt and the first frame to video."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.rng import Generators, rand
from ldm.diffusion.samplers.base import Noise
from ldm.diffusion.schedules import Schedule
from ldm.diffusion.tasks.base import Encode, Request, Start, Task


@dataclass(frozen=True, kw_only=True)
class TextToVideo(Task):
    """A video from pure noise and a prompt; with an image, one that begins with it.

    Extra channels, the same for all frames: 1 if the first frame is an input, then its latents
    (Blattmann et al. 2023, Stable Video Diffusion, arXiv:2311.15127, section 4.3).
    first_frame_prob: the share of training videos whose first frame is an input.
    shared_noise: the share of the noise's variance that all frames have in common (Ge et al. 2023,
    "Preserve Your Own Correlation", arXiv:2305.10474, section 4.1).
    """

    name = "video"
    is_video = True
    first_frame_prob: float = 0.5
    shared_noise: float = 0.0

    def __post_init__(self) -> None:
        for name in ("first_frame_prob", "shared_noise"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise ValueError(f"task.{name}={share} is a share: from 0 to 1")

    def extra_channels(self, channels: int) -> int:
        return 1 + channels

    def incompatible_with(self, trained: Any) -> str | None:
        if trained.name != self.name:
            return "the network was not trained on videos"
        if trained.shared_noise != self.shared_noise:
            return f"the network was trained with task.shared_noise={trained.shared_noise}"
        return None

    def shape_noise(self, eps: Tensor) -> Tensor:
        """Noise (B, C, F, h, w) of unit variance; `shared_noise` correlates any two frames."""
        own, root = math.sqrt(1 - self.shared_noise), math.sqrt(eps.shape[2])
        common = math.sqrt(own**2 / root**2 + self.shared_noise) - own / root
        return own * eps + common * eps.sum(dim=2, keepdim=True) / root

    def training_pair(
        self, latents: Tensor, images: Tensor, encode: Encode, *, generator: Generators
    ) -> tuple[Tensor, Tensor]:
        """The latents, and the first frames of some videos, (B, 1 + C, F, h, w)."""
        present = rand(len(latents), generator, device=latents.device) < self.first_frame_prob
        return latents, first_frame_channels(latents[:, :, 0], present, like=latents)

    def start(self, request: Request, encode: Encode, schedule: Schedule, *, noise: Noise) -> Start:
        if request.mask is not None or request.strength != 1:
            raise ValueError("task=video takes a prompt and image=FILE for its first frame alone")
        x = request.noise_scale * noise(request.latents)  # (B, C, F, h, w)
        if request.image is None:
            first, absent = torch.zeros_like(x[:, :, 0]), torch.zeros(len(x), device=x.device)
            return Start(x=x, t=1.0, concat=first_frame_channels(first, absent, like=x))
        first, present = encode(request.image), torch.ones(len(x), device=x.device)  # (B, C, h, w)

        def project(x0_hat: Tensor) -> Tensor:
            return torch.cat([first[:, :, None], x0_hat[:, :, 1:]], dim=2)

        concat = first_frame_channels(first, present, like=x)
        return Start(x=x, t=1.0, concat=concat, project=project)


def first_frame_channels(first: Tensor, present: Tensor, *, like: Tensor) -> Tensor:
    """(B, 1 + C, F, h, w) of first frames (B, C, h, w); zeros where `present` (B,) is 0."""
    flag = present.to(first)[:, None, None, None].expand(-1, 1, *first.shape[2:])
    both = torch.cat([flag, first * flag], dim=1)  # (B, 1 + C, h, w)
    return both[:, :, None].expand(-1, -1, like.shape[2], -1, -1)
