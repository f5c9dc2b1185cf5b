"""Network, autoencoder and text encoder."""

import torch
from torch import nn
from torch.nn import functional as F

from ldm.diffusion.conditioning import Condition

COLOURS = ("red", "lime", "blue", "white", "magenta", "gold", "cyan")


class ConvNet(nn.Module):
    """Two convolutions, moved by the time and by the caption."""

    def __init__(self, *, in_channels, out_channels, context_dim, pooled_dim, width=16):
        super().__init__()
        self.in_channels, self.out_channels, self.multiple = in_channels, out_channels, 1
        self.first = nn.Conv2d(in_channels, width, 3, padding=1)
        self.embed = nn.Linear(1 + pooled_dim, width)
        self.last = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x, t, cond):
        time = t.expand(len(x)).to(x.dtype)[:, None] / 1000
        moved = self.embed(torch.cat([time, cond.pooled.to(x.dtype)], 1))
        return self.last(F.silu(self.first(x) + moved[:, :, None, None]))


class FoldingAutoencoder(nn.Module):
    """Pixels folded into channels, times a gain."""

    def __init__(self, *, factor: int = 4, gain: float = 1.0) -> None:
        super().__init__()
        self.factor, self.channels, self.gain = factor, 3 * factor**2, gain

    def encode(self, images, *, generator=None):
        return F.pixel_unshuffle(images, self.factor) * self.gain

    def decode(self, latents):
        return F.pixel_shuffle(latents / self.gain, self.factor)


class ColourTextEncoder(nn.Module):
    """One number for each colour that a caption names."""

    width = max_length = truncated = 0
    pooled_width, names = len(COLOURS), ()

    def forward(self, captions):
        rows = [[float(colour in caption) for colour in COLOURS] for caption in captions]
        return Condition(pooled=torch.tensor(rows))

    def null(self, n):
        return Condition(pooled=torch.zeros(n, len(COLOURS)))
