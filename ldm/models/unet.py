"""The denoising network.

Shapes: B batch, C latent channels, E extra channels, h w latent grid, L text tokens, D text width,
P pooled width, T time width.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.conditioning import Condition
from ldm.models.layers import (
    Downsample,
    ResBlock,
    SpatialTransformer,
    Stage,
    Upsample,
    timestep_embedding,
)
from ldm.models.style_attention import StyleAttention, StyleTokens
from ldm.models.temporal import TemporalLayers, fold_frames, unfold_frames


class UNet(nn.Module):
    """A convolutional encoder and decoder with skip connections, attention and text conditioning.

    With in_channels=4, out_channels=4, context_dim=768 the defaults are the network of Stable
    Diffusion 1.x ("High-Resolution Image Synthesis with Latent Diffusion Models", Rombach et al.).

    in_channels: latents and extra channels together (C + E).
    context_dim: width D of the text states; 0 builds no cross-attention.
    pooled_dim: width P of the pooled vector that is added to the time embedding; 0 adds none.
    style_dim: width F of the features of a style picture; 0 has no attention to one. style_code:
    how many numbers it is told in.
    channels, multipliers: level i has channels * multipliers[i] features on half the grid of i - 1.
    blocks: residual blocks a level on the way down, one more on the way up.
    attention: which levels have transformers; the middle always has one.
    depth: transformer blocks in each transformer. groups: of every group normalisation.
    embedding: width T of what residual blocks are told, 4 * channels where None.
    scale_shift, positional_waves: see ResBlock; small networks learn faster with both.
    temporal: layers over time, see Temporal: it takes videos, and pictures as before.

    Raises ValueError where `attention` and `multipliers` differ in length, a level's features
    cannot be divided into `heads` or `groups`, or `positional_waves` is negative.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        context_dim: int,
        pooled_dim: int = 0,
        style_dim: int = 0,
        style_code: int = 8,
        channels: int = 320,
        multipliers: Sequence[int] = (1, 2, 4, 4),
        blocks: int = 2,
        attention: Sequence[bool] = (True, True, True, False),
        heads: int = 8,
        depth: int = 1,
        groups: int = 32,
        dropout: float = 0.0,
        embedding: int | None = None,
        scale_shift: bool = False,
        positional_waves: int = 0,
        temporal: bool = False,
    ) -> None:
        super().__init__()
        if len(attention) != len(multipliers):
            raise ValueError(
                f"multipliers {tuple(multipliers)} make {len(multipliers)} levels, but attention "
                f"{tuple(attention)} is for {len(attention)}: give one value a level"
            )
        if positional_waves < 0:
            raise ValueError(
                f"positional_waves must be 0 (no place maps) or more, got {positional_waves}"
            )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.context_dim, self.pooled_dim, self.style_dim = context_dim, pooled_dim, style_dim
        self.widths = [channels * m for m in multipliers]
        self.blocks, self.attention = blocks, tuple(attention)
        self.heads, self.depth, self.groups = heads, depth, groups

        width = self.widths[0]
        self.embedding = time_dim = embedding or 4 * width
        self.scale_shift, self.positional_waves = scale_shift, positional_waves
        self.time_mlp = build_mlp(width, time_dim)
        self.pooled_mlp = build_mlp(pooled_dim, time_dim) if pooled_dim else None
        told = context_dim or style_dim
        sizes = {"code": style_code, "width": told, "time_dim": time_dim}
        self.style = StyleTokens(style_dim, **sizes) if style_dim else None
        beside = partial(StyleAttention, style_width=told, heads=heads) if style_dim else None
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self._build_stages(
            partial(
                ResBlock,
                time_dim=time_dim,
                groups=groups,
                eps=1e-5,
                dropout=dropout,
                scale_shift=scale_shift,
                positional_waves=positional_waves,
            ),
            partial(
                SpatialTransformer,
                context_dim=context_dim,
                heads=heads,
                depth=depth,
                groups=groups,
                extra_attention=beside,
            ),
        )
        self.norm_out = nn.GroupNorm(groups, width, eps=1e-5)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)
        self._zero_residuals()
        self.temporal = None
        if temporal:
            widths, attend = self._stages()
            sizes = {"time_dim": time_dim, "heads": heads, "groups": groups}
            self.temporal = TemporalLayers(widths, attend, **sizes)

    def _build_stages(
        self, block: partial[ResBlock], transformer: partial[SpatialTransformer]
    ) -> None:
        levels = list(zip(self.widths, self.attention, strict=True))
        width, skips = self.widths[0], [self.widths[0]]
        self.down = nn.ModuleList()
        for level, (out, attend) in enumerate(levels):
            last = level == len(levels) - 1
            ins = [width] + [out] * (self.blocks - 1)
            self.down.append(
                Stage(
                    [block(n, out) for n in ins],
                    [transformer(out) for _ in ins if attend],
                    None if last else Downsample(out),
                )
            )
            skips += [out] * (self.blocks if last else self.blocks + 1)
            width = out

        self.mid = Stage([block(width, width), block(width, width)], [transformer(width)])

        self.up = nn.ModuleList()
        for level, (out, attend) in reversed(list(enumerate(levels))):
            ins = [n + skips.pop() for n in [width] + [out] * self.blocks]
            self.up.append(
                Stage(
                    [block(n, out) for n in ins],
                    [transformer(out) for _ in ins if attend],
                    Upsample(out) if level else None,
                )
            )
            width = out

    def _stages(self) -> tuple[list[int], list[bool]]:
        """Channels after each stage, down, middle and up, and whether it has attention."""
        widths = [*self.widths, self.widths[-1], *reversed(self.widths)]
        return widths, [*self.attention, True, *reversed(self.attention)]

    def _zero_residuals(self) -> None:
        """Every residual branch starts as the identity, and the output as zero.

        Source: "Diffusion Models Beat GANs on Image Synthesis" (Dhariwal and Nichol), its code.
        """
        last = [self.conv_out]
        last += [m.conv2 for m in self.modules() if isinstance(m, ResBlock)]
        last += [m.proj_out for m in self.modules() if isinstance(m, SpatialTransformer)]
        for conv in last:
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)

    @property
    def extension_prefixes(self) -> tuple[str, ...]:
        """How the names begin of what a network for text and pictures has not.

        It acts as zero at first.
        """
        kinds = (StyleTokens, StyleAttention, TemporalLayers)
        return tuple(f"{name}." for name, part in self.named_modules() if isinstance(part, kinds))

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The network's raw output (B, out_channels, h, w) for noisy latents x (B, C, h, w).

        With `temporal` also for videos, x and cond.concat (B, C, frames, h, w).

        t, () or (B,): the timestep on the scale 0..999, possibly fractional. cond.concat is
        appended to x; parts of `cond` that the network was not built for are not looked at.
        Raises ValueError where sizes do not fit the network.
        """
        self._check(x, cond)
        if cond.concat is not None:
            x = torch.cat([x, cond.concat], dim=1)  # (B, C + E, h, w)
        emb = self.time_mlp(timestep_embedding(t.expand(len(x)), self.widths[0]).to(x.dtype))
        if self.pooled_mlp is not None:
            emb = emb + self.pooled_mlp(cond.pooled)  # (B, T)
        style = None
        if self.style is not None and cond.style is not None:
            style, told = self.style(cond.style)  # (B, K, D), (B, T)
            emb = emb + told
        context = (cond.tokens, cond.mask, style)
        if x.ndim == 4:
            return self._run(x, F.silu(emb), context)
        frames = x.shape[2]
        emb = self.temporal.tell(emb, frames)  # (B F, T)
        context = tuple(
            None if part is None else part.repeat_interleave(frames, dim=0) for part in context
        )
        return unfold_frames(self._run(fold_frames(x), F.silu(emb), context, frames), frames)

    def _run(
        self, x: Tensor, emb: Tensor, context: tuple[Tensor | None, ...], frames: int | None = None
    ) -> Tensor:
        """All input channels (B, C + E, h, w) to the output; frames: B are of videos of so many."""

        def over_time(x: Tensor, stage: int) -> Tensor:
            return x if frames is None else self.temporal(x, frames, stage=stage)

        x = self.conv_in(x)  # (B, widths[0], h, w)
        skips = [x]
        for i, stage in enumerate(self.down):
            skips += stage(x, emb, context)
            skips[-1] = x = over_time(skips[-1], i)
        x = over_time(self.mid(x, emb, context)[-1], len(self.down))
        for i, stage in enumerate(self.up, len(self.down) + 1):
            x = over_time(stage(x, emb, context, skips)[-1], i)
            del skips[-len(stage.blocks) :]
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, out_channels, h, w)

    @property
    def multiple(self) -> int:
        """What height and width of the latents are multiples of."""
        return 2 ** (len(self.widths) - 1)

    def _check(self, x: Tensor, cond: Condition) -> None:
        batch, channels, *frames = x.shape[:-2]
        size = x.shape[-2:]
        if frames and self.temporal is None:
            raise ValueError("the network knows pictures, not videos: train one with task=video")
        extra = 0 if cond.concat is None else cond.concat.shape[1]
        if channels + extra != self.in_channels:
            raise ValueError(
                f"the network takes {self.in_channels} channels, got {channels} + {extra} "
                "(x + cond.concat): its in_channels must count the task's extra channels"
            )
        multiple = self.multiple
        if any(n % multiple for n in size):
            raise ValueError(
                f"latents of {size[0]}x{size[1]} do not fit {len(self.widths)} levels: "
                f"height and width must be multiples of {multiple}"
            )
        if self.context_dim:
            check_condition_part("tokens", cond.tokens, batch=batch, width=self.context_dim)
        if self.pooled_dim:
            check_condition_part("pooled", cond.pooled, batch=batch, width=self.pooled_dim)
        if self.style_dim and cond.style is not None:
            check_condition_part("style", cond.style, batch=batch, width=self.style_dim)


def check_condition_part(name: str, part: Tensor | None, *, batch: int, width: int) -> None:
    """Raises ValueError unless the condition's part is there, for `batch` images, `width` wide."""
    shape = None if part is None else tuple(part.shape)
    if shape is None or (shape[0], shape[-1]) != (batch, width):
        raise ValueError(
            f"the network needs cond.{name} for {batch} images, {width} wide, got shape {shape}: "
            "build it with the sizes of the text encoder in use"
        )


def build_mlp(in_features: int, out_features: int) -> nn.Sequential:
    """Linear, SiLU, linear."""
    return nn.Sequential(
        nn.Linear(in_features, out_features), nn.SiLU(), nn.Linear(out_features, out_features)
    )
