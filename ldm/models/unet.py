"""The denoising network: a UNet with text conditioning."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.conditioning import Condition
from ldm.models import layers
from ldm.models.denoiser_inputs import check_denoiser_inputs
from ldm.models.layers import ResBlock, SpatialTransformer, Stage, TransformerBlock
from ldm.models.style import StyleAttention, StyleTokens
from ldm.models.temporal import TemporalLayers, fold_frames, unfold_frames

NUM_SIZES = 6  # of `Condition.sizes`


class UNet(nn.Module):
    """A convolutional encoder and decoder with skip connections, attention and text conditioning.

    With in_channels=4, out_channels=4, context_dim=768 the defaults are the network of Stable
    Diffusion 1.x (Rombach et al. 2022).

    in_channels: latents and extra channels together (C + E).
    context_dim: width D of the text states; 0 builds no cross-attention.
    pooled_dim: width P of the pooled vector that is added to the time embedding; 0 adds none.
    size_embedding: width of the embedding of each of the six numbers of `Condition.sizes`, which
    is appended to the pooled vector ("SDXL", Podell et al. 2023, section 2.2); 0 embeds none.
    size_factor: pixels of a latent, for the sizes that a condition does not give.
    style_dim: width F of the features of a style image; 0 builds no attention to style.
    style_code: the number of values in the code of a style image.
    channels, multipliers: level i has channels * multipliers[i] features on half the grid of i - 1.
    blocks: residual blocks of a level on the way down; one more on the way up.
    attention: which levels have transformers; the middle always has one.
    heads: of each attention. depth: transformer blocks in each transformer. Either is one number,
    or one a level; the middle has those of the last level. groups: of every group normalisation.
    embedding: width T of the time embedding; None is 4 * channels.
    scale_shift, positional_waves: see ResBlock; small networks learn faster with both.
    linear_projections: changes no result; the 1x1 convolutions before and after transformers are
    written to diffusers' files as linear layers, as those of Stable Diffusion 2 and SDXL are.
    temporal: adds TemporalLayers, so the network takes videos as well as images.
    checkpointing: the levels, or "all", whose blocks the backward pass computes again, for less
    memory; the middle goes with the last level. Results and gradients are the same.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        context_dim: int,
        pooled_dim: int = 0,
        size_embedding: int = 0,
        size_factor: int = 8,
        style_dim: int = 0,
        style_code: int = 8,
        channels: int = 320,
        multipliers: Sequence[int] = (1, 2, 4, 4),
        blocks: int = 2,
        attention: Sequence[bool] = (True, True, True, False),
        heads: int | Sequence[int] = 8,
        depth: int | Sequence[int] = 1,
        groups: int = 32,
        dropout: float = 0.0,
        embedding: int | None = None,
        scale_shift: bool = False,
        positional_waves: int = 0,
        linear_projections: bool = False,
        temporal: bool = False,
        checkpointing: Sequence[int] | str = (),
    ) -> None:
        super().__init__()
        check_levels(multipliers, attention)
        checkpointed = select_levels(checkpointing, len(multipliers))
        if positional_waves < 0:
            raise ValueError(
                f"positional_waves must be 0 (no positional maps) or more, got {positional_waves}"
            )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.context_dim, self.pooled_dim, self.style_dim = context_dim, pooled_dim, style_dim
        self.size_embedding, self.size_factor = size_embedding, size_factor
        self.widths = [channels * m for m in multipliers]
        self.multiple = 2 ** (len(multipliers) - 1)  # of h and w
        self.blocks, self.attention, self.groups = blocks, tuple(attention), groups
        self.heads = spread_over_levels("heads", heads, multipliers)
        self.depth = spread_over_levels("depth", depth, multipliers)
        self.linear_projections = linear_projections

        width = self.widths[0]
        self.embedding = time_dim = embedding or 4 * width
        self.scale_shift, self.positional_waves = scale_shift, positional_waves
        self.time_mlp = build_mlp(width, time_dim)
        added = pooled_dim + NUM_SIZES * size_embedding
        self.pooled_mlp = build_mlp(added, time_dim) if added else None
        self.style = style_attention = None
        if style_dim:
            style_width = context_dim or style_dim
            sizes = {"code": style_code, "width": style_width, "time_dim": time_dim}
            self.style = StyleTokens(style_dim, **sizes)
            style_attention = partial(StyleAttention, style_width=style_width)
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        how = {"scale_shift": scale_shift, "positional_waves": positional_waves, "eps": 1e-5}
        how |= {"time_dim": time_dim, "groups": groups, "dropout": dropout}
        sizes = {"context_dim": context_dim, "groups": groups}
        self._build_stages(
            partial(ResBlock, **how),
            partial(SpatialTransformer, **sizes, extra_attention=style_attention),
        )
        for level in checkpointed:
            self.down[level].checkpointing = self.up[-1 - level].checkpointing = True
        self.mid.checkpointing = self.down[-1].checkpointing
        self.norm_out = nn.GroupNorm(groups, width, eps=1e-5)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)
        self._zero_residuals()
        start = 0
        for block in self._text_blocks():
            block.columns = slice(start, start := start + 2 * block.cross_attn.to_k.out_features)
        self.temporal = None
        if temporal:
            # Of the stages down, in the middle, and up.
            widths = [*self.widths, self.widths[-1], *reversed(self.widths)]
            attend = [*self.attention, True, *reversed(self.attention)]
            every = [*self.heads, self.heads[-1], *reversed(self.heads)]
            heads = [n if attended else 0 for n, attended in zip(every, attend, strict=True)]
            self.temporal = TemporalLayers(widths, heads, time_dim=time_dim, groups=groups)

    def _build_stages(
        self, block: partial[ResBlock], transformer: partial[SpatialTransformer]
    ) -> None:
        every = zip(self.heads, self.depth, strict=True)
        factories = [partial(transformer, heads=n, depth=depth) for n, depth in every]
        levels = list(zip(self.widths, self.attention, factories, strict=True))
        width, skips = self.widths[0], [self.widths[0]]
        self.down = nn.ModuleList()
        for level, (out, attend, make_transformer) in enumerate(levels):
            last = level == len(levels) - 1
            ins = [width] + [out] * (self.blocks - 1)
            blocks = [block(n, out) for n in ins]
            transformers = [make_transformer(out) for _ in ins if attend]
            resample = None if last else layers.Downsample(out)
            self.down.append(Stage(blocks, transformers, resample))
            skips += [out] * (self.blocks if last else self.blocks + 1)
            width = out

        self.mid = Stage([block(width, width), block(width, width)], [factories[-1](width)])

        self.up = nn.ModuleList()
        for level, (out, attend, make_transformer) in reversed(list(enumerate(levels))):
            ins = [n + skips.pop() for n in [width] + [out] * self.blocks]
            blocks = [block(n, out) for n in ins]
            transformers = [make_transformer(out) for _ in ins if attend]
            self.up.append(Stage(blocks, transformers, layers.Upsample(out) if level else None))
            width = out

    def _zero_residuals(self) -> None:
        """Sets the last layer of each residual branch to zero, as Dhariwal and Nichol do."""
        last = [self.conv_out]
        last += [m.conv2 for m in self.modules() if isinstance(m, ResBlock)]
        last += [m.proj_out for m in self.modules() if isinstance(m, SpatialTransformer)]
        for conv in last:
            layers.zero_module(conv)

    def _text_blocks(self) -> list[TransformerBlock]:
        blocks = (m for m in self.modules() if isinstance(m, TransformerBlock))
        return [block for block in blocks if block.cross_attn is not None]

    def project_text(self, tokens: Tensor) -> Tensor | None:
        """The keys and values (B, L, W) of text states (B, L, D) in all layers that read them."""
        parts = [part for each in self._text_blocks() for part in each.cross_attn.project(tokens)]
        return torch.cat(parts, dim=-1) if parts else None

    @property
    def extension_prefixes(self) -> tuple[str, ...]:
        """The name prefixes of layers for style and time, which have no effect until trained."""
        kinds = (StyleTokens, StyleAttention, TemporalLayers)
        return tuple(f"{name}." for name, part in self.named_modules() if isinstance(part, kinds))

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Returns the raw output (B, out_channels, h, w) for noisy latents x (B, C, h, w).

        With `temporal` also for videos, x and cond.concat (B, C, frames, h, w).
        t, () or (B,): the timestep on the scale 0..999, possibly fractional. cond.concat is
        appended to x; parts of `cond` that the network was not built for are ignored.
        Raises ValueError where sizes do not fit the network.
        """
        self._check(x, cond)
        if cond.concat is not None:
            x = torch.cat([x, cond.concat], dim=1)  # (B, C + E, h, w)
        # Without pooled vectors and styles all images have one embedding, and copies of an image
        # are one until the first layer that reads the text.
        copies = cond.copies if self.context_dim and x.ndim == 4 and t.ndim == 0 else 1
        if self.pooled_mlp is None and cond.style is None and copies > 1:
            x, t = x[: len(x) // copies], t.reshape(1)
        time = layers.timestep_embedding(t if t.ndim else t.expand(len(x)), self.widths[0])
        emb = self.time_mlp(time.to(x.dtype))  # (B, T), or (1, T) of copies
        if self.pooled_mlp is not None:
            emb = emb + self.pooled_mlp(self._pool(x, cond))  # (B, T)
        style = None
        if self.style is not None and cond.style is not None:
            style, style_emb = self.style(cond.style)  # (B, K, D), (B, T)
            emb = emb + style_emb
        cond = replace(cond, pooled=None, concat=None, style=style, sizes=None)
        levels = len(self.down)
        if x.ndim == 4:
            return self._run(x, F.silu(emb), cond, [None] * (2 * levels + 1))
        frames = x.shape[2]
        emb = self.temporal.embed_frames(emb, frames)  # (B F, T)
        cond = cond.map(lambda part: part.repeat_interleave(frames, dim=0))
        mixers = self.temporal.mixers(frames, like=x)
        return unfold_frames(self._run(fold_frames(x), F.silu(emb), cond, mixers), frames)

    def _pool(self, x: Tensor, cond: Condition) -> Tensor:
        """The pooled vectors (B, P) and the embeddings of the sizes, side by side."""
        if not self.size_embedding:
            return cond.pooled
        sizes = cond.sizes
        if sizes is None:  # of a picture that is neither scaled nor cropped
            height, width = (self.size_factor * n for n in x.shape[-2:])
            sizes = torch.zeros(NUM_SIZES, device=x.device)
            sizes[0::4], sizes[1::4] = height, width
            sizes = sizes.expand(len(x), -1)
        embedded = layers.timestep_embedding(sizes.flatten(), self.size_embedding)
        embedded = embedded.reshape(len(x), -1).to(x.dtype)  # (B, 6 size_embedding)
        return torch.cat([cond.pooled, embedded], dim=1) if self.pooled_dim else embedded

    def _run(self, x: Tensor, emb: Tensor, cond: Condition, mixers: Sequence) -> Tensor:
        """All input channels (B, C + E, h, w) to the output; mixers: the stages' `temporal`."""
        levels = len(self.down)
        x = self.conv_in(x)  # (B, widths[0], h, w)
        skips = [x]
        for stage, temporal in zip(self.down, mixers[:levels], strict=True):
            skips += stage(x, emb, cond, temporal=temporal)
            x = skips[-1]
        x = self.mid(x, emb, cond, temporal=mixers[levels])[-1]
        for stage, temporal in zip(self.up, mixers[levels + 1 :], strict=True):
            x = stage(x, emb, cond, skips, temporal)[-1]
            del skips[-len(stage.blocks) :]
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, out_channels, h, w)

    def _check(self, x: Tensor, cond: Condition) -> None:
        widths = {"tokens": self.context_dim, "pooled": self.pooled_dim}
        if cond.style is not None:
            widths["style"] = self.style_dim
        if cond.sizes is not None and self.size_embedding:
            widths["sizes"] = NUM_SIZES
        check_denoiser_inputs(
            *(x, cond),
            in_channels=self.in_channels,
            multiple=self.multiple,
            what=f"{len(self.widths)} levels",
            widths=widths,
            takes_videos=self.temporal is not None,
        )


def check_levels(multipliers: Sequence[int], attention: Sequence[bool]) -> None:
    """Raises ValueError unless `attention` has one value for each level."""
    if len(attention) != len(multipliers):
        raise ValueError(
            f"multipliers {tuple(multipliers)} make {len(multipliers)} levels, but attention "
            f"{tuple(attention)} is for {len(attention)}: give one value a level"
        )


def spread_over_levels(name: str, value: int | Sequence[int], levels: Sequence) -> tuple[int, ...]:
    """Returns the value of each level; ValueError where a list has another number of them."""
    if isinstance(value, int):
        return (value,) * len(levels)
    if len(value) != len(levels):
        raise ValueError(
            f"model.{name} {tuple(value)} has {len(value)} values for {len(levels)} levels: "
            "give one number, or one a level"
        )
    return tuple(value)


def select_levels(checkpointing: Sequence[int] | str, count: int) -> set[int]:
    """Returns the levels that a setting names; ValueError for one that does not exist."""
    levels = list(range(count))
    if checkpointing == "all":
        return set(levels)
    named = [checkpointing] if isinstance(checkpointing, str | int) else checkpointing
    for level in named:
        if type(level) is not int or level not in levels:
            raise ValueError(f"model.checkpointing has {level!r}: give all, or some of {levels}")
    return set(named)


def build_mlp(in_features: int, out_features: int) -> nn.Sequential:
    """Linear, SiLU, linear."""
    return nn.Sequential(
        nn.Linear(in_features, out_features), nn.SiLU(), nn.Linear(out_features, out_features)
    )
