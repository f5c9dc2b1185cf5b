"""The autoencoder: images to latents, on the grid h = H / factor, w = W / factor, and back."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.rng import Generators, randn
from ldm.models import layers
from ldm.models.layers import ResBlock, Stage

AUTOENCODER_NORM_EPS = 1e-6


class AutoencoderKL(nn.Module):
    """A convolutional variational autoencoder whose latents have unit variance in each channel.

    The defaults are the autoencoder of Stable Diffusion 1.x (Rombach et al. 2022, section 3.1),
    without its weights or latent scale.

    latent_channels: C, the attribute `channels`.
    channels, multipliers: level i has channels * multipliers[i] features on half the grid of i - 1.
    blocks: residual blocks of a level in the encoder; one more in the decoder.
    groups: of every group normalisation; 0 normalises nothing, which small networks learn faster.
    attention: self-attention at the lowest resolution.
    patch: pixels a side that are folded into channels first and unfolded last, part of `factor`.
    quant_convs: a 1x1 convolution on either side of the latents; those of 16 channels have none.
    """

    def __init__(
        self,
        *,
        latent_channels: int = 4,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 4, 4),
        blocks: int = 2,
        groups: int = 32,
        attention: bool = True,
        patch: int = 1,
        quant_convs: bool = True,
    ) -> None:
        super().__init__()
        self.channels = latent_channels
        self.factor = patch * 2 ** (len(multipliers) - 1)
        self.widths = [channels * m for m in multipliers]
        self.blocks, self.groups, self.attention, self.patch = blocks, groups, attention, patch
        sizes = {"widths": self.widths, "groups": groups, "attention": attention, "patch": patch}
        self.encoder = Encoder(out_channels=2 * latent_channels, blocks=blocks, **sizes)
        self.quant_convs = quant_convs
        self.quant_conv = self.post_quant_conv = nn.Identity()
        if quant_convs:
            self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
            self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.decoder = Decoder(in_channels=latent_channels, blocks=blocks + 1, **sizes)
        self.register_buffer("shift", torch.zeros(latent_channels))
        self.register_buffer("scale", torch.ones(latent_channels))

    def set_scale(self, shift: Tensor | float, scale: Tensor | float) -> None:
        """Sets shift and scale, () or (C,) each, of `encode`'s (z - shift) * scale.

        For unit variance they are the mean and 1 / the standard deviation of each channel.
        """
        scale = torch.as_tensor(scale, dtype=self.scale.dtype)
        if not (scale.isfinite() & (scale > 0)).all():
            raise ValueError(f"a latent scale must be positive and finite, got {scale.tolist()}")
        self.shift.copy_(torch.as_tensor(shift, dtype=self.shift.dtype))
        self.scale.copy_(scale)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and log-variance, in [-30, 20], of the unscaled latents of images."""
        _, channels, height, width = images.shape
        if channels != 3 or height % self.factor or width % self.factor:
            raise ValueError(
                f"images must be (B, 3, H, W) with H and W multiples of {self.factor}, "
                f"got {tuple(images.shape)}: crop or resize them"
            )
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)  # (B, C, h, w) each
        return mean, logvar.clamp(-30, 20)

    def encode(self, images: Tensor, *, generator: Generators = None) -> Tensor:
        """Returns unit-variance latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1].

        They are a sample of the posterior by `generator` (or one per image); without it, its mean.
        """
        z = sample_posterior(*self.posterior(images), generator=generator)
        return scale_latents(z, self.shift, self.scale)

    def decode(self, latents: Tensor) -> Tensor:
        """Returns images (B, 3, H, W), not clamped to [-1, 1], of latents (B, C, h, w)."""
        if latents.shape[1] != self.channels:
            raise ValueError(
                f"the autoencoder decodes {self.channels} latent channels, got {latents.shape[1]}: "
                "use the autoencoder that the latents were made with"
            )
        return self.decode_unscaled(latents / self.scale[:, None, None] + self.shift[:, None, None])

    def decode_unscaled(self, z: Tensor) -> Tensor:
        """Returns the images of unscaled latents z (B, C, h, w)."""
        return self.decoder(self.post_quant_conv(z))


def sample_posterior(mean: Tensor, logvar: Tensor | None, *, generator: Generators) -> Tensor:
    """Returns unscaled latents z (B, C, h, w); the mean without a generator or a variance."""
    if generator is None or logvar is None:
        return mean
    noise = randn(mean.shape, generator, device=mean.device, dtype=mean.dtype)
    return mean + (0.5 * logvar).exp() * noise


def scale_latents(z: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Returns unit-variance latents (B, C, h, w) of unscaled ones, by shift and scale (C,)."""
    return (z - shift[:, None, None]) * scale[:, None, None]


class Encoder(nn.Module):
    """Images (B, 3, H, W) to features (B, out_channels, h, w)."""

    def __init__(
        self,
        *,
        out_channels: int,
        widths: Sequence[int],
        blocks: int,
        groups: int,
        attention: bool,
        patch: int,
    ) -> None:
        super().__init__()
        self.patch = patch
        block = partial(ResBlock, time_dim=None, groups=groups, eps=AUTOENCODER_NORM_EPS)
        width = widths[0]
        self.conv_in = nn.Conv2d(3 * patch**2, width, 3, padding=1)
        self.down = nn.ModuleList()
        for level, out in enumerate(widths):
            last = level == len(widths) - 1
            ins = [width] + [out] * (blocks - 1)
            resample = None if last else layers.Downsample(out, asymmetric=True)
            self.down.append(Stage([block(n, out) for n in ins], resample=resample))
            width = out
        self.mid = build_mid_stage(width, groups=groups, attention=attention)
        self.norm_out = layers.make_group_norm(groups, width, AUTOENCODER_NORM_EPS)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(F.pixel_unshuffle(images, self.patch))  # (B, widths[0], H / p, W / p)
        for stage in [*self.down, self.mid]:
            x = stage(x)[-1]
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Features (B, in_channels, h, w) to images (B, 3, H, W)."""

    def __init__(
        self,
        *,
        in_channels: int,
        widths: Sequence[int],
        blocks: int,
        groups: int,
        attention: bool,
        patch: int,
    ) -> None:
        super().__init__()
        self.patch = patch
        block = partial(ResBlock, time_dim=None, groups=groups, eps=AUTOENCODER_NORM_EPS)
        width = widths[-1]
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.mid = build_mid_stage(width, groups=groups, attention=attention)
        self.up = nn.ModuleList()
        for level, out in reversed(list(enumerate(widths))):
            ins = [width] + [out] * (blocks - 1)
            resample = layers.Upsample(out) if level else None
            self.up.append(Stage([block(n, out) for n in ins], resample=resample))
            width = out
        self.norm_out = layers.make_group_norm(groups, width, AUTOENCODER_NORM_EPS)
        self.conv_out = nn.Conv2d(width, 3 * patch**2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)  # (B, widths[-1], h, w)
        for stage in [self.mid, *self.up]:
            x = stage(x)[-1]
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.patch)


def build_mid_stage(width: int, *, groups: int, attention: bool) -> Stage:
    """Returns block, attention (if `attention`), block."""
    how = {"groups": groups, "eps": AUTOENCODER_NORM_EPS}
    blocks = [ResBlock(width, width, time_dim=None, **how) for _ in range(2)]
    return Stage(blocks, [layers.SpatialAttention(width, **how)] if attention else [])


class IdentityAutoencoder(nn.Module):
    """The autoencoder of pixel-space diffusion: `patch` pixels a side are folded into channels."""

    def __init__(self, *, patch: int = 1) -> None:
        super().__init__()
        if patch < 1:
            raise ValueError(f"autoencoder.patch={patch} must be 1 (pixels as they are) or more")
        self.factor, self.channels = patch, 3 * patch**2

    def encode(self, images: Tensor, *, generator: Generators = None) -> Tensor:
        """Returns images (B, 3, H, W) folded, (B, C, h, w)."""
        return F.pixel_unshuffle(images, self.factor) if self.factor > 1 else images

    def decode(self, latents: Tensor) -> Tensor:
        """Returns latents (B, C, h, w) unfolded, (B, 3, H, W)."""
        return F.pixel_shuffle(latents, self.factor) if self.factor > 1 else latents
