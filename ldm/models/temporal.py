"""Videos: layers over time for a network of images, and an autoencoder of images on each frame.

All other layers see the frames of videos as a batch of images.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.rng import Generators, share_generators
from ldm.models.layers import Attention, timestep_embedding, zero_module


class TemporalLayers(nn.Module):
    """A frame mixer after each stage of a UNet, and an embedding of each frame's number.

    widths: channels after each stage. heads: of the temporal attention of each stage; 0: the stage
    gets none. All begin as identities ("Make-A-Video", Singer et al. 2022, arXiv:2209.14792,
    section 3.2).
    """

    def __init__(
        self, widths: Sequence[int], heads: Sequence[int], *, time_dim: int, groups: int
    ) -> None:
        super().__init__()
        self.time_dim = time_dim
        sizes = {"time_dim": time_dim, "groups": groups}
        self.blocks = nn.ModuleList(
            TemporalBlock(width, heads=n, **sizes) for width, n in zip(widths, heads, strict=True)
        )
        self.number = nn.Sequential(
            nn.Linear(2 * time_dim, time_dim), nn.SiLU(), zero_module(nn.Linear(time_dim, time_dim))
        )

    def embed_frames(self, emb: Tensor, frames: int) -> Tensor:
        """Adds to the embedding of each video (B, T) that of each of its frames -> (B F, T)."""
        emb = emb[:, None].expand(-1, frames, -1)  # (B, F, T)
        numbers = self.embed_frame_numbers(frames, like=emb).expand(len(emb), -1, -1)
        return (emb + self.number(torch.cat([emb, numbers], dim=2))).flatten(0, 1)

    def mixers(self, frames: int, *, like: Tensor) -> list[Callable[[Tensor], Tensor]]:
        """Returns the function of each stage that mixes the frames of features (B F, C, h, w)."""
        numbers = self.embed_frame_numbers(frames, like=like)
        return [partial(block, numbers=numbers) for block in self.blocks]

    def embed_frame_numbers(self, frames: int, *, like: Tensor) -> Tensor:
        """Returns (F, T): a fixed embedding of 0 .. F - 1."""
        return timestep_embedding(torch.arange(frames, device=like.device), self.time_dim).to(like)


class TemporalBlock(nn.Module):
    """A convolution over three frames, then attention over all at each position; heads=0: none."""

    def __init__(self, channels: int, *, time_dim: int, heads: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-5)
        self.conv = zero_module(nn.Conv2d(channels, channels, (3, 1), padding=(1, 0)))
        self.attn = None
        if heads:
            self.attn_norm = nn.LayerNorm(channels)
            self.place = nn.Linear(time_dim, channels)
            self.attn = Attention(channels, heads=heads)
            zero_module(self.attn.to_out)

    def forward(self, x: Tensor, numbers: Tensor) -> Tensor:
        """x (B F, C, h, w), numbers (F, T) -> as x."""
        # A view as (B, C, F, N), which is channels_last if x is: nothing is copied.
        y = x.permute(0, 2, 3, 1).unflatten(0, (-1, len(numbers))).flatten(2, 3)  # (B, F, N, C)
        y = y.permute(0, 3, 1, 2)  # (B, C, F, N)
        y = y + self.conv(F.silu(self.norm(y)))
        if self.attn is not None:
            tokens = y.permute(0, 3, 2, 1)  # (B, N, F, C)
            tokens = self.attn_norm(tokens) + self.place(numbers)
            mixed = self.attn(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
            y = y + mixed.permute(0, 3, 2, 1)
        y = y.permute(0, 2, 3, 1).flatten(0, 1)  # (B F, N, C)
        return y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class FramewiseAutoencoder(nn.Module):
    """An autoencoder of images that encodes and decodes each frame of a video by itself."""

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.channels, self.factor = autoencoder.channels, autoencoder.factor

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        """Returns the autoencoder's own, so its digest is that of the autoencoder alone."""
        return self.autoencoder.state_dict(*args, **kwargs)

    def encode(self, images: Tensor, *, generator: Generators = None) -> Tensor:
        """Returns latents (B, C, F, h, w) of videos (B, 3, F, H, W), or of images.

        generator: one, or those of the videos, which their frames share in order.
        """
        if images.ndim == 4:
            return self.autoencoder.encode(images, generator=generator)
        frames = images.shape[2]
        generator = share_generators(generator, frames)
        latents = self.autoencoder.encode(fold_frames(images), generator=generator)
        return unfold_frames(latents, frames)

    def decode(self, latents: Tensor) -> Tensor:
        """Returns videos (B, 3, F, H, W) of latents (B, C, F, h, w), or images."""
        if latents.ndim == 4:
            return self.autoencoder.decode(latents)
        return unfold_frames(self.autoencoder.decode(fold_frames(latents)), latents.shape[2])


def fold_frames(videos: Tensor) -> Tensor:
    """(B, C, F, ...) -> images (B F, C, ...)."""
    return videos.transpose(1, 2).flatten(0, 1)


def unfold_frames(images: Tensor, frames: int) -> Tensor:
    """(B F, C, ...) -> videos (B, C, F, ...)."""
    return images.unflatten(0, (-1, frames)).transpose(1, 2)
