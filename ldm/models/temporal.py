"""What a network for pictures needs to make videos: layers over time, without effect at first.

Frames of a video are pictures of a batch to all other layers.
Shapes: B videos, F frames, C channels, h w grid, N = h * w positions, T time width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.layers import Attention, timestep_embedding


class TemporalLayers(nn.Module):
    """A mixer of frames after each stage of a UNet, and what each frame is told of its number.

    widths: channels after each stage. attend: which of them get attention beside the convolution.
    With all of it at its initial values a video is its frames, each by itself ("Make-A-Video",
    Singer et al. 2022, arXiv:2209.14792, section 3.2: pseudo-3D layers that begin as identities).
    """

    def __init__(
        self,
        widths: Sequence[int],
        attend: Sequence[bool],
        *,
        time_dim: int,
        heads: int,
        groups: int,
    ) -> None:
        super().__init__()
        self.time_dim = time_dim
        sizes = {"time_dim": time_dim, "groups": groups}
        self.blocks = nn.ModuleList(
            TemporalBlock(width, heads=heads if attended else 0, **sizes)
            for width, attended in zip(widths, attend, strict=True)
        )
        self.number = nn.Sequential(
            nn.Linear(2 * time_dim, time_dim), nn.SiLU(), zero_module(nn.Linear(time_dim, time_dim))
        )

    def tell(self, emb: Tensor, frames: int) -> Tensor:
        """What is told to each frame, (B F, T), out of what is told to each video, (B, T).

        Which frame it is, and the time and text together: where a thing is that moves.
        """
        emb = emb[:, None].expand(-1, frames, -1)  # (B, F, T)
        numbers = self.embed_frame_numbers(frames, like=emb).expand(len(emb), -1, -1)
        return (emb + self.number(torch.cat([emb, numbers], dim=2))).flatten(0, 1)

    def forward(self, x: Tensor, frames: int, *, stage: int) -> Tensor:
        """Features after a stage, (B F, C, h, w), each with a look at the other frames."""
        return self.blocks[stage](x, self.embed_frame_numbers(frames, like=x))

    def embed_frame_numbers(self, frames: int, *, like: Tensor) -> Tensor:
        """(F, T): a fixed embedding of 0 .. F - 1."""
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
        # Seen as (B, C, F, N), which is channels_last where x is: nothing is copied.
        y = x.permute(0, 2, 3, 1).unflatten(0, (-1, len(numbers))).flatten(2, 3)  # (B, F, N, C)
        y = y.permute(0, 3, 1, 2)  # (B, C, F, N)
        y = y + self.conv(F.silu(self.norm(y)))
        if self.attn is not None:
            tokens = y.permute(0, 3, 2, 1)  # (B, N, F, C)
            seen = (self.attn_norm(tokens) + self.place(numbers)).flatten(0, 1)  # (B N, F, C)
            y = y + self.attn(seen).unflatten(0, tokens.shape[:2]).permute(0, 3, 2, 1)
        y = y.permute(0, 2, 3, 1).flatten(0, 1)  # (B F, N, C)
        return y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


def zero_module(layer: nn.Module) -> nn.Module:
    """The layer with zeros for parameters."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def fold_frames(videos: Tensor) -> Tensor:
    """(B, C, F, ...) -> pictures (B F, C, ...)."""
    return videos.transpose(1, 2).flatten(0, 1)


def unfold_frames(images: Tensor, frames: int) -> Tensor:
    """(B F, C, ...) -> videos (B, C, F, ...)."""
    return images.unflatten(0, (-1, frames)).transpose(1, 2)
