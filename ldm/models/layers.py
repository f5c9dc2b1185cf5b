"""The layers of denoiser, autoencoder and classifier."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.diffusion.conditioning import Condition
from ldm.models.fused_linear import FusedLinear
from ldm.models.kernels import attend
from ldm.models.positional_map import PositionalMap
from ldm.models.random_layers import Dropout
from ldm.models.token_sequences import apply_to_sequence, repeat_like, to_grid, to_sequence

# (width, heads=) -> attention of (B, N, C) to tokens
ExtraAttentionFactory = Callable[..., nn.Module]


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Cosines, then sines, of t (B,) at `dim / 2` frequencies from 1 towards 1/10000: (B, dim).

    "Attention is all you need", section 3.5, in Stable Diffusion's order and with its roundings.
    """
    half = dim // 2  # in float32: half precision cannot tell neighbouring timesteps apart
    steps = torch.arange(half, device=t.device, dtype=torch.float32)
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * steps / half)  # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def zero_module(layer: nn.Module) -> nn.Module:
    """Returns the layer with all parameters set to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def make_group_norm(groups: int, channels: int, eps: float) -> nn.Module:
    """Returns group normalisation, or the identity for 0 groups."""
    return nn.GroupNorm(groups, channels, eps) if groups else nn.Identity()


class ResBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, with the time embedding added between them.

    Ho et al. 2020, appendix B. scale_shift: the embedding scales and shifts the normalised features
    (AdaGN, Dhariwal and Nichol 2021, section 3.1). positional_waves: above 0, a PositionalMap is
    added to the result. groups: 0 normalises nothing, and the block starts as its shortcut ("Fixup
    Initialization", Zhang et al. 2019).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        time_dim: int | None,
        groups: int,
        eps: float,
        dropout: float = 0.0,
        scale_shift: bool = False,
        positional_waves: int = 0,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = make_group_norm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_proj = None
        if time_dim:
            self.time_proj = FusedLinear(time_dim, out_channels, parts=2 if scale_shift else 1)
        self.place = None
        if time_dim and positional_waves:
            self.place = PositionalMap(time_dim, out_channels, positional_waves)
        self.norm2 = make_group_norm(groups, out_channels, eps)
        self.dropout = Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        if not groups:
            zero_module(self.conv2)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """x (B, in, h, w), emb (B, T) after its activation -> (B, out, h, w)."""
        y = self.conv1(F.silu(self.norm1(x)))  # (B, out, h, w)
        time = None if self.time_proj is None else self.time_proj(emb)[:, :, None, None]
        if time is None:
            y = self.norm2(y)
        elif self.scale_shift:
            scale, shift = time.chunk(2, dim=1)  # (B, out, 1, 1) each
            y = torch.addcmul(shift, self.norm2(y), 1 + scale)
        else:
            y = self.norm2(y + time)
        y = self.shortcut(x) + self.conv2(self.dropout(F.silu(y)))
        return y if self.place is None else y + to_grid(self.place(emb, y.shape[2:]), like=y)


class Attention(nn.Module):
    """Multi-head attention from x to `context`, or to x itself if `context_dim` is None."""

    def __init__(
        self, dim: int, *, context_dim: int | None = None, heads: int, bias: bool = False
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(
                f"attention over {dim} channels cannot have {heads} heads: "
                f"choose a number of heads that divides {dim}"
            )
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_out = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        projected: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """x (B, N, dim), context (B, L, context_dim), mask (B, L), True is attended -> as x.

        projected: the result of `project` for this context, which is computed here without it.
        """
        if projected is None:
            projected = self.project(x if context is None else context)
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N or L, dim / heads)
            for y in (self.to_q(x), *projected)
        )
        mask = None if mask is None else mask[:, None, None, :]  # (B, 1, 1, L)
        return self.to_out(attend(q, k, v, mask).transpose(1, 2).flatten(2))

    def project(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values (B, L, dim) of a context."""
        return self.to_k(context), self.to_v(context)


class FeedForward(nn.Module):
    """GEGLU: one linear map gated by the GELU of another ("GLU variants", Shazeer 2020, eq. 6)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj_in = FusedLinear(dim, 4 * dim, parts=2)
        self.proj_out = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj_in(x).chunk(2, dim=-1)  # (B, N, 4 dim) each
        gate = F.gelu(gate)
        # A backward pass needs both factors. Without one, the product takes no memory of its own.
        return self.proj_out(value * gate if torch.is_grad_enabled() else gate.mul_(value))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text (if `context_dim`), feed-forward; pre-norm.

    extra_attention: makes an attention to style tokens, whose output is added to that of the text.
    """

    def __init__(
        self,
        dim: int,
        *,
        context_dim: int,
        heads: int,
        extra_attention: ExtraAttentionFactory | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.self_attn = Attention(dim, heads=heads)
        self.norm2 = self.cross_attn = None
        self.columns = slice(0)  # the keys and values of `cross_attn` in `Condition.projected`
        if context_dim:
            self.norm2 = nn.LayerNorm(dim)
            self.cross_attn = Attention(dim, context_dim=context_dim, heads=heads)
        self.style_attn = extra_attention(dim, heads=heads) if extra_attention else None
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, cond: Condition) -> Tensor:
        """x (B, N, dim) -> (B, N, dim); cond.style are style tokens (B, K, D)."""
        x = x + self.self_attn(self.norm1(x))
        style = None if cond.style is None else self.style_attn(x, cond.style)
        if self.cross_attn is not None:
            x = repeat_like(x, cond.tokens)  # here copies of an image begin to differ
            every = cond.projected
            own = None if every is None else every[..., self.columns].chunk(2, dim=-1)
            x = x + self.cross_attn(self.norm2(x), cond.tokens, cond.mask, own)
        x = x if style is None else x + style
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """`depth` transformer blocks over the grid, and a shortcut (Rombach et al. 2022, 3.3)."""

    def __init__(
        self,
        channels: int,
        *,
        context_dim: int,
        heads: int,
        depth: int,
        groups: int,
        extra_attention: ExtraAttentionFactory | None = None,
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        how = {"context_dim": context_dim, "heads": heads, "extra_attention": extra_attention}
        self.layers = nn.ModuleList(TransformerBlock(channels, **how) for _ in range(depth))
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, cond: Condition) -> Tensor:
        """x (B, C, h, w) -> (B, C, h, w); cond.style are style tokens (B, K, D)."""
        y = apply_to_sequence(self.proj_in, to_sequence(self.norm(x)))  # (B, N, C)
        for layer in self.layers:
            y = layer(y, cond)
        y = to_grid(apply_to_sequence(self.proj_out, y), like=x)
        return repeat_like(x, y) + y


class SpatialAttention(nn.Module):
    """Single-head self-attention over the positions of a feature map, and a shortcut."""

    def __init__(self, channels: int, *, groups: int, eps: float) -> None:
        super().__init__()
        self.group_norm = make_group_norm(groups, channels, eps)
        self.attn = Attention(channels, heads=1, bias=True)

    def forward(self, x: Tensor, cond: Condition | None = None) -> Tensor:
        """x (B, C, h, w) -> (B, C, h, w); `cond` is not used."""
        return x + to_grid(self.attn(to_sequence(self.group_norm(x))), like=x)


class Downsample(nn.Module):
    """Halves the grid by a strided 3x3 convolution; asymmetric: padded below and right only."""

    def __init__(self, channels: int, *, asymmetric: bool = False) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Doubles the grid by repetition, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.Module):
    """The layers of one resolution: residual blocks, each followed by its attention, if any.

    The middle of a network is block, attention, block. `resample` leads to the next resolution.
    With the attribute `checkpointing`, the backward pass computes each block and its attention
    again, and their inner features are not stored ("Training deep nets with sublinear memory cost",
    Chen et al. 2016).
    """

    checkpointing = False

    def __init__(
        self,
        blocks: Sequence[ResBlock],
        attentions: Sequence[SpatialTransformer | SpatialAttention] = (),
        resample: Downsample | Upsample | None = None,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList(attentions)
        self.resample = resample

    def forward(
        self,
        x: Tensor,
        emb: Tensor | None = None,
        cond: Condition | None = None,
        skips: Sequence[Tensor] = (),
        temporal: Callable[[Tensor], Tensor] | None = None,
    ) -> list[Tensor]:
        """x (B, C, h, w) -> the features after each block and after resampling, the result last.

        emb (B, T): the time embedding. skips: features that are concatenated before each block,
        from the end. temporal: mixes the frames of the result, if x are frames of videos.
        """
        features = []
        for i in range(len(self.blocks)):
            inputs = (i, x, skips[-1 - i] if skips else None, emb, cond)
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(self._run_block, *inputs, use_reentrant=False)
            else:
                x = self._run_block(*inputs)
            features.append(x)
        if self.resample is not None:
            features.append(self.resample(x))
        if temporal is not None:
            features[-1] = temporal(features[-1])
        return features

    def _run_block(
        self, i: int, x: Tensor, skip: Tensor | None, emb: Tensor | None, cond: Condition | None
    ) -> Tensor:
        if skip is not None:
            x = torch.cat([x, repeat_like(skip, x)], dim=1)  # (B, C + C_skip, h, w)
        x = self.blocks[i](x, emb)
        return self.attentions[i](x, cond) if i < len(self.attentions) else x
