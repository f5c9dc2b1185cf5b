"""The blocks of a transformer with two streams of tokens, image and text."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.kernels import attend
from ldm.models.style import StyleAttention

NORM_EPS = 1e-6


class JointBlock(nn.Module):
    """One attention over image and text tokens, then a feed-forward of each; adaLN-Zero.

    is_last: the text is read, and not changed, as no block follows.
    """

    checkpointing = False

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        qk_norm: bool,
        has_text: bool,
        has_style: bool,
        is_last: bool,
    ) -> None:
        super().__init__()
        self.image = TokenStream(width, heads=heads, qk_norm=qk_norm)
        self.text = None
        if has_text:
            self.text = TokenStream(width, heads=heads, qk_norm=qk_norm, is_read_only=is_last)
        self.style_attn = None
        if has_style:
            self.style_attn = StyleAttention(width, style_width=width, heads=heads)

    def forward(
        self, x: Tensor, text: Tensor | None, emb: Tensor, mask: Tensor | None, style: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, N, width), text (B, L, width) -> both, changed; the last block's text is None.

        emb (B, width) or (1, width): the modulation. mask (B, 1, 1, N + L): True is attended.
        """
        (q, k, v), changes = self.image.project(x, emb)
        count = x.shape[1]
        if self.text is not None:
            (text_q, text_k, text_v), text_changes = self.text.project(text, emb)
            q = q if text_q is None else torch.cat([q, text_q], dim=2)
            k, v = torch.cat([k, text_k], dim=2), torch.cat([v, text_v], dim=2)
        attended = attend(q, k, v, mask).transpose(1, 2).flatten(2)  # (B, N + L, width)
        mixed = None if style is None else self.style_attn(x, style)
        x = self.image.finish(x, attended[:, :count], changes, mixed)
        if self.text is None or not text_changes:
            return x, None
        return x, self.text.finish(text, attended[:, count:], text_changes)


class TokenStream(nn.Module):
    """The layers of a block for one kind of tokens.

    is_read_only: gives keys and values alone, and the tokens are not changed.
    """

    def __init__(
        self, width: int, *, heads: int, qk_norm: bool, is_read_only: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.parts = heads, 2 if is_read_only else 6
        self.modulation = nn.Linear(width, self.parts * width)
        self.to_q = None if is_read_only else nn.Linear(width, width)
        self.to_k, self.to_v = nn.Linear(width, width), nn.Linear(width, width)
        head = width // heads
        self.norm_q = HeadNorm(head) if qk_norm and not is_read_only else None
        self.norm_k = HeadNorm(head) if qk_norm else None
        self.to_out = self.ff = None
        if not is_read_only:
            self.to_out = nn.Linear(width, width)
            inner = nn.Linear(width, 4 * width), nn.GELU(approximate="tanh")
            self.ff = nn.Sequential(*inner, nn.Linear(4 * width, width))

    def project(
        self, x: Tensor, emb: Tensor
    ) -> tuple[tuple[Tensor | None, Tensor, Tensor], Sequence[Tensor]]:
        """Queries, keys and values (B, heads, N, d) of x (B, N, width), and what `finish` needs."""
        parts = self.modulation(emb)[:, None].to(x.dtype).chunk(self.parts, dim=-1)
        x = modulate(x, *parts[:2])
        q, k, v = (
            None if layer is None else layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        q = q if self.norm_q is None else self.norm_q(q)
        k = k if self.norm_k is None else self.norm_k(k)
        return (q, k, v), parts[2:]

    def finish(
        self, x: Tensor, attended: Tensor, changes: Sequence[Tensor], more: Tensor | None = None
    ) -> Tensor:
        """x with the attention's output, what `more` adds to that, and the feed-forward's."""
        gate, shift, scale, feed_gate = changes
        x = x + gate * self.to_out(attended)
        x = x if more is None else x + more
        return x + feed_gate * self.ff(modulate(x, shift, scale))


class HeadNorm(nn.Module):
    """RMS norm of each head's queries or keys, in float32 ("RMSNorm", Zhang and Sennrich 2019)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), NORM_EPS).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm of tokens (B, N, C), scaled and shifted by (B, 1, C)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=NORM_EPS), 1 + scale)
