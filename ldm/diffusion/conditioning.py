"""What a denoiser reads besides the noisy latents, and what guidance reads.

Shapes: B batch, L text tokens, D text width, P pooled width, E extra channels, h w latent grid,
N patches of a style image, F their width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """The inputs of a denoiser for a batch; a part that is absent is None.

    tokens (B, L, D): text states for cross-attention.
    mask (B, L), bool: True where a token may be attended; None attends to all.
    pooled (B, P): one vector per image, added to the time embedding.
    concat (B, E, h, w): extra input channels, such as a mask and masked latents.
    style (B, N, F): features of a style image; all zeros for an image without one.
    """

    tokens: Tensor | None = None
    mask: Tensor | None = None
    pooled: Tensor | None = None
    concat: Tensor | None = None
    style: Tensor | None = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Condition":
        """The condition with `fn` applied to every part that is present."""
        return Condition(*(None if part is None else fn(part) for part in self.parts()))

    def parts(self) -> tuple[Tensor | None, ...]:
        """tokens, mask, pooled, concat, style."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def to(self, device: torch.device | str) -> "Condition":
        """The condition on `device`."""
        return self.map(lambda part: part.to(device))

    def cat(self, other: "Condition") -> "Condition":
        """Both batches one after the other; ValueError if only one has some part."""
        return self._zip(other, lambda a, b: torch.cat([a, b]))

    def where(self, keep: Tensor, other: "Condition") -> "Condition":
        """This condition's text where `keep` (B,) is True, the other's elsewhere.

        `concat` and `style` stay those of this condition.
        """

        def choose(a: Tensor, b: Tensor) -> Tensor:
            return torch.where(keep.reshape(-1, *[1] * (a.ndim - 1)), a, b)

        text, other_text = (replace(each, concat=None, style=None) for each in (self, other))
        return replace(text._zip(other_text, choose), concat=self.concat, style=self.style)

    def _zip(self, other: "Condition", fn: Callable[[Tensor, Tensor], Tensor]) -> "Condition":
        merged = []
        for field, a, b in zip(fields(self), self.parts(), other.parts(), strict=True):
            if (a is None) != (b is None):
                raise ValueError(f"only one of two conditions to be merged has '{field.name}'")
            merged.append(None if a is None else fn(a, b))
        return Condition(*merged)


@dataclass(frozen=True)
class GuidancePrompts:
    """The prompts themselves, for guidance that reads them.

    texts: one per image. encode: captions to a Condition, by the text encoder. parse: a prompt to
    its parts, each a text and its weight.
    """

    texts: Sequence[str]
    encode: Callable[[Sequence[str]], Condition]
    parse: Callable[[str], list[tuple[str, float]]]


@dataclass(frozen=True)
class Conditioning:
    """What a guidance steers towards (`positive`) and away from (`negative`)."""

    positive: Condition
    negative: Condition
    prompts: GuidancePrompts | None = None

    def require_prompts(self, reader: str) -> GuidancePrompts:
        """The prompts; ValueError without them, which names the guidance that reads them."""
        if self.prompts is None:
            raise ValueError(f"{reader} reads the prompts: give Conditioning(prompts=...)")
        return self.prompts
