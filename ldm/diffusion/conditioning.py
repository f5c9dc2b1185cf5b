"""What a denoiser is told beside the noisy latents.

Shapes: B batch, L text tokens, D text width, P pooled width, E extra channels, h w latent grid,
N patches of a style picture, F their width.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """The conditioning of a batch; every part is optional, and absent parts are None.

    tokens (B, L, D): text states for cross-attention.
    mask (B, L), bool: True where a token may be attended; None attends to all.
    pooled (B, P): one vector an image, added to the time embedding.
    concat (B, E, h, w): extra input channels, such as a mask and masked latents.
    style (B, N, F): features of a style picture; all zeros where an image has none.
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
        """Both batches after one another.

        Raises ValueError where one has a part that the other lacks.
        """
        return self._zip(other, lambda a, b: torch.cat([a, b]))

    def where(self, keep: Tensor, other: "Condition") -> "Condition":
        """This condition's text where `keep` (B,) is True, the other's elsewhere.

        Only what the text says is exchanged: `concat` (an image, a mask) and `style` stay.
        """

        def choose(a: Tensor, b: Tensor) -> Tensor:
            return torch.where(keep.reshape(-1, *[1] * (a.ndim - 1)), a, b)

        text, other_text = (replace(one, concat=None, style=None) for one in (self, other))
        pictures = {"concat": self.concat, "style": self.style}
        return replace(text._zip(other_text, choose), **pictures)

    def _zip(self, other: "Condition", fn: Callable[[Tensor, Tensor], Tensor]) -> "Condition":
        merged = []
        for field, a, b in zip(fields(self), self.parts(), other.parts(), strict=True):
            if (a is None) != (b is None):
                raise ValueError(f"only one of two conditions to be merged has '{field.name}'")
            merged.append(None if a is None else fn(a, b))
        return Condition(*merged)
