"""The denoising network as a transformer: image and text tokens in one attention."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.diffusion.conditioning import Condition
from ldm.models.denoiser_inputs import check_denoiser_inputs
from ldm.models.dit_blocks import JointBlock, TokenStream, modulate
from ldm.models.layers import timestep_embedding, zero_module
from ldm.models.style import StyleAttention, StyleTokens
from ldm.models.token_sequences import to_sequence
from ldm.models.unet import build_mlp, select_levels
from ldm.utils.errors import UsageError

TIME_WAVES = 256  # the width of the timestep's cosines and sines, as in Stable Diffusion 3


class MMDiT(nn.Module):
    """Stable Diffusion 3's transformer (Esser et al. 2024, arXiv:2403.03206, section 4).

    Patches of the latents and the text states are two streams of tokens with weights of their own,
    which meet in one attention. Timestep and pooled text scale and shift all normalised tokens
    (adaLN-Zero, "DiT", Peebles and Xie 2022). Without text it is DiT. It takes images alone.

    in_channels: latents and extra channels together (C + E).
    context_dim: width D of the text states; 0 builds no text stream.
    pooled_dim: width P of the pooled text; with 0 it is the mean of the text states that the mask
    shows (Lumina-T2X, Gao et al. 2024), so that text reaches every modulation.
    style_dim: width F of the features of a style image; 0 builds no attention to style.
    style_code: the number of values in the code of a style image.
    width: of the tokens. depth: the number of blocks. heads: of each attention.
    patch: a token is patch x patch latents. qk_norm: RMS norm of queries and keys, which keeps
    attention stable in half precision (section 5.3.2).
    position_offset, position_scale: a row or column of tokens, counted from the middle of its grid,
    has the position (number + offset) * scale. A grid may have any size and aspect. Weights that
    were trained with a table of S positions of a grid of B have the offset S / 2 and the scale B/S.
    checkpointing: the numbers of blocks, or "all", that the backward pass computes again, for less
    memory. Results and gradients are the same.
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
        width: int = 640,
        depth: int = 9,
        heads: int = 10,
        patch: int = 2,
        qk_norm: bool = True,
        position_offset: float = 0.0,
        position_scale: float = 1.0,
        temporal: bool = False,
        checkpointing: Sequence[int] | str = (),
    ) -> None:
        super().__init__()
        if temporal:
            raise UsageError("model=dit_* takes images, not videos: take a UNet, as model=nano")
        for name, value in (("heads", heads), ("depth", depth)):
            if not isinstance(value, int):
                raise ValueError(
                    f"model.{name}={value} is one number for all blocks of model=dit_*"
                )
        if width % heads or width % 4:
            raise ValueError(
                f"model.width={width} must be a multiple of model.heads={heads} and of 4"
            )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.context_dim, self.pooled_dim, self.style_dim = context_dim, pooled_dim, style_dim
        self.width, self.heads, self.patch, self.qk_norm = width, heads, patch, qk_norm
        self.position_offset, self.position_scale = position_offset, position_scale
        self.multiple = patch  # of h and w
        checkpointed = select_levels(checkpointing, depth)

        self.conv_in = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.time_mlp = build_mlp(TIME_WAVES, width)
        self.text_in = nn.Linear(context_dim, width) if context_dim else None
        pooled = pooled_dim or context_dim
        self.pooled_mlp = build_mlp(pooled, width) if pooled else None
        self.style = None
        if style_dim:
            self.style = StyleTokens(style_dim, code=style_code, width=width, time_dim=width)
        self.blocks = nn.ModuleList(
            JointBlock(
                width,
                heads=heads,
                qk_norm=qk_norm,
                has_text=bool(context_dim),
                has_style=bool(style_dim),
                is_last=i == depth - 1,
            )
            for i in range(depth)
        )
        for i in checkpointed:
            self.blocks[i].checkpointing = True
        self.modulation_out = nn.Linear(width, 2 * width)
        self.proj_out = nn.Linear(width, patch**2 * out_channels)
        self._initialise()

    def _initialise(self) -> None:
        """DiT's first weights: the network returns zeros, and each block changes nothing."""
        for stream in (m for m in self.modules() if isinstance(m, TokenStream)):
            for layer in (m for m in stream.modules() if isinstance(m, nn.Linear)):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
            zero_module(stream.modulation)
        nn.init.xavier_uniform_(self.conv_in.weight.flatten(1))
        nn.init.zeros_(self.conv_in.bias)
        for mlp in filter(None, (self.time_mlp, self.pooled_mlp)):
            for layer in (mlp[0], mlp[2]):
                nn.init.normal_(layer.weight, std=0.02)
        zero_module(self.modulation_out)
        zero_module(self.proj_out)

    @property
    def extension_prefixes(self) -> tuple[str, ...]:
        """The name prefixes of layers for style, which have no effect until trained."""
        kinds = (StyleTokens, StyleAttention)
        return tuple(f"{name}." for name, part in self.named_modules() if isinstance(part, kinds))

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Returns the raw output (B, out_channels, h, w) for noisy latents x (B, C, h, w).

        t, () or (B,): the timestep on the scale 0..999, possibly fractional. cond.concat is
        appended to x; parts of `cond` that the network was not built for are ignored.
        Raises ValueError where sizes do not fit the network.
        """
        self._check(x, cond)
        if cond.concat is not None:
            x = torch.cat([x, cond.concat], dim=1)  # (B, C + E, h, w)
        rows, columns = (n // self.patch for n in x.shape[2:])
        # The sum is float32 under autocast, and so are all tokens between blocks, and their norms.
        y = to_sequence(self.conv_in(x)).contiguous() + self.embed_grid(rows, columns, x)
        emb = self.time_mlp(timestep_embedding(t.reshape(-1), TIME_WAVES).to(x.dtype))
        if self.pooled_mlp is not None:
            emb = emb + self.pooled_mlp(self._pool(cond))  # (B, width); (1, width) without text
        style = None
        if self.style is not None and cond.style is not None:
            style, style_emb = self.style(cond.style)  # (B, K, width), (B, width)
            emb = emb + style_emb
        emb = F.silu(emb)
        text = mask = None
        if self.text_in is not None:
            text = self.text_in(cond.tokens).to(y.dtype)  # (B, L, width)
            if cond.mask is not None:
                mask = F.pad(cond.mask.bool(), (y.shape[1], 0), value=True)[:, None, None]
        for block in self.blocks:
            if block.checkpointing and torch.is_grad_enabled():
                y, text = checkpoint(block, y, text, emb, mask, style, use_reentrant=False)
            else:
                y, text = block(y, text, emb, mask, style)
        shift, scale = self.modulation_out(emb)[:, None].to(y.dtype).chunk(2, dim=-1)
        y = self.proj_out(modulate(y, shift, scale))  # (B, N, patch^2 out_channels)
        y = y.unflatten(2, (self.patch, self.patch, -1)).unflatten(1, (rows, columns))
        return y.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def embed_grid(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Sines and cosines of each token's column, then of its row: (1, rows columns, width)."""
        half = self.width // 2
        row, column = (
            embed_positions(n, half, self.position_offset, self.position_scale, like.device)
            for n in (rows, columns)
        )
        grid = (rows, columns, half)
        both = torch.cat([column[None].expand(grid), row[:, None].expand(grid)], dim=-1)
        return both.flatten(0, 1)[None].to(like.dtype)

    def _pool(self, cond: Condition) -> Tensor:
        """The pooled text (B, P), or the mean (B, D) of the text states that may be attended."""
        if self.pooled_dim:
            return cond.pooled
        if cond.mask is None:
            return cond.tokens.mean(dim=1)
        weights = cond.mask[..., None].to(cond.tokens.dtype)  # (B, L, 1)
        return (cond.tokens * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)

    def _check(self, x: Tensor, cond: Condition) -> None:
        widths = {"tokens": self.context_dim, "pooled": self.pooled_dim}
        if cond.style is not None:
            widths["style"] = self.style_dim
        check_denoiser_inputs(
            *(x, cond),
            in_channels=self.in_channels,
            multiple=self.multiple,
            what=f"patches of {self.patch}x{self.patch}",
            widths=widths,
        )


def embed_positions(
    count: int, width: int, offset: float, scale: float, device: torch.device
) -> Tensor:
    """Sines, then cosines, of `count` positions at width / 2 frequencies: (count, width)."""
    numbers = torch.arange(count, device=device, dtype=torch.float32) - (count + 1) // 2
    waves = torch.arange(width // 2, device=device, dtype=torch.float32) / (width / 2)
    angles = ((numbers + offset) * scale)[:, None] * 10000.0**-waves
    return torch.cat([angles.sin(), angles.cos()], dim=1)
