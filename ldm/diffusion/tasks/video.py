"""Videos, from a prompt alone or from a prompt and their first frame.

Shapes: B batch, C latent channels, E extra channels, F frames, H W pixels, h w latent grid.
"""

import math

import torch
from torch import Tensor

from ldm.diffusion.rng import Generators, rand
from ldm.diffusion.samplers.base import Noise
from ldm.diffusion.schedules import Schedule
from ldm.diffusion.tasks.base import BaseTask, Encode, Request, Start


class TextToVideo(BaseTask):
    """A video from pure noise and a prompt; with a picture, one that begins with it.

    Extra channels: whether the first frame is shown, then its latents, the same for all frames, so
    that each can be compared with it (Blattmann et al. 2023, Stable Video Diffusion,
    arXiv:2311.15127, section 4.3). first_frame_prob: the share of training
    videos whose first frame is an input.
    shared_noise: the share of the noise's variance that all frames have in common. A network of
    pictures makes like frames of like noise, and what stays the same need not be learnt (Ge et al.
    2023, "Preserve Your Own Correlation", arXiv:2305.10474, section 4.1).
    Raises ValueError where `first_frame_prob` or `shared_noise` is no share.
    """

    name = "video"
    temporal = True

    def __init__(self, *, first_frame_prob: float = 0.5, shared_noise: float = 0.0) -> None:
        shares = {"first_frame_prob": first_frame_prob, "shared_noise": shared_noise}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"task.{name}={share} is a share: from 0 to 1")
        self.first_frame_prob, self.shared_noise = first_frame_prob, shared_noise

    def extra_channels(self, channels: int) -> int:
        """1 + C."""
        return 1 + channels

    def incompatible_with(self, trained: object) -> str | None:
        """It takes a network of this very task, and the noise that it was trained with."""
        if not isinstance(trained, TextToVideo):
            return "the network knows no frames"
        if trained.shared_noise != self.shared_noise:
            return f"the network was trained with task.shared_noise={trained.shared_noise}"
        return None

    def shape_noise(self, eps: Tensor) -> Tensor:
        """Noise (B, C, F, h, w) of unit variance; any two frames are correlated by the share."""
        own, root = math.sqrt(1 - self.shared_noise), math.sqrt(eps.shape[2])
        common = math.sqrt(own**2 / root**2 + self.shared_noise) - own / root
        return own * eps + common * eps.sum(dim=2, keepdim=True) / root

    def training_concat(
        self, latents: Tensor, images: Tensor, encode: Encode, *, generator: Generators
    ) -> Tensor:
        """The first frames of some of the videos, (B, 1 + C, F, h, w)."""
        given = rand(len(latents), generator, device=latents.device) < self.first_frame_prob
        return first_frame_channels(latents[:, :, 0], given, like=latents)

    def start(self, request: Request, encode: Encode, schedule: Schedule, *, noise: Noise) -> Start:
        """Noise of unit variance at t = 1, and the first frame where there is one, which is kept.

        Raises ValueError for a mask or a strength.
        """
        if request.mask is not None or request.strength != 1:
            raise ValueError("task=video takes a prompt and image=FILE for its first frame alone")
        x = noise(request.latents)  # (B, C, F, h, w)
        told = torch.full((len(x),), request.image is not None, device=x.device)
        if request.image is None:
            return Start(
                x=x, t=1.0, concat=first_frame_channels(torch.zeros_like(x[:, :, 0]), told, like=x)
            )
        first = encode(request.image)  # (B, C, h, w)

        def project(x0_hat: Tensor) -> Tensor:
            return torch.cat([first[:, :, None], x0_hat[:, :, 1:]], dim=2)

        return Start(x=x, t=1.0, concat=first_frame_channels(first, told, like=x), project=project)


def first_frame_channels(first: Tensor, present: Tensor, *, like: Tensor) -> Tensor:
    """(B, 1 + C, F, h, w) of first frames (B, C, h, w), zeros where `given` (B,) is not True."""
    told = present.to(first)[:, None, None, None].expand(-1, 1, *first.shape[2:])
    both = torch.cat([told, first * told], dim=1)  # (B, 1 + C, h, w)
    return both[:, :, None].expand(-1, -1, like.shape[2], -1, -1)
