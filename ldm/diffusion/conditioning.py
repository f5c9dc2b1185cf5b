"""The inputs of a denoiser besides the noisy latents, and those of guidance."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ldm.diffusion.schedules import Schedule

NetworkTimestep = Callable[[Schedule, Tensor], Tensor]  # t -> a network's input


@dataclass(frozen=True)
class Condition:
    """The inputs of a denoiser for a batch; a part that is absent is None.

    tokens (B, L, D): text states for cross-attention.
    mask (B, L), bool: True where a token may be attended; None attends to all.
    pooled (B, P): one vector per image, added to the time embedding.
    concat (B, E, h, w): extra input channels, such as a mask and masked latents.
    style (B, N, F): features of a style image; all zeros for an image without one.
    sizes (B, 6): pixels of each picture: height and width before it was scaled, top and left of its
    crop, height and width that are aimed at; see `UNet`.
    projected (B, L, W): the network's keys and values of `tokens`, see `Denoiser.project_text`.
    copies: how often the batch repeats the same images, one after another, with other texts.
    """

    tokens: Tensor | None = None
    mask: Tensor | None = None
    pooled: Tensor | None = None
    concat: Tensor | None = None
    style: Tensor | None = None
    projected: Tensor | None = None
    sizes: Tensor | None = None
    copies: int = 1  # `map` and `cat` give 1: who repeats images sets it

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Condition":
        """Applies `fn` to every part that is present."""
        return Condition(*(None if part is None else fn(part) for part in self.parts()))

    def parts(self) -> tuple[Tensor | None, ...]:
        """All but `copies`, in order."""
        return tuple(getattr(self, name) for name in CONDITION_PARTS)

    def to(self, device: torch.device | str) -> "Condition":
        """The condition on `device`."""
        return self.map(lambda part: part.to(device))

    def cat(self, other: "Condition") -> "Condition":
        """Both batches one after the other; ValueError if only one has some part."""
        return self._zip(other, lambda a, b: torch.cat([a, b]))

    def where(self, keep: Tensor, other: "Condition") -> "Condition":
        """The text of the other condition where `keep` (B,) is False; all else stays."""

        def choose(a: Tensor, b: Tensor) -> Tensor:
            return torch.where(keep.reshape(-1, *[1] * (a.ndim - 1)), a, b)

        none = dict.fromkeys(IMAGE_PARTS)
        text, other_text = (replace(each, **none) for each in (self, other))
        kept = {name: getattr(self, name) for name in IMAGE_PARTS}
        return replace(text._zip(other_text, choose), **kept)

    def _zip(self, other: "Condition", fn: Callable[[Tensor, Tensor], Tensor]) -> "Condition":
        merged = []
        for name, a, b in zip(CONDITION_PARTS, self.parts(), other.parts(), strict=True):
            if (a is None) != (b is None):
                raise ValueError(f"only one of two conditions to be merged has '{name}'")
            merged.append(None if a is None else fn(a, b))
        return Condition(*merged)


IMAGE_PARTS = ("concat", "style", "sizes")  # the others are of the text
CONDITION_PARTS = tuple(field.name for field in fields(Condition) if field.name != "copies")


@dataclass(frozen=True)
class GuidancePrompts:
    """The prompts themselves, for guidance that reads them."""

    texts: Sequence[str]  # one per image
    encode: Callable[[Sequence[str]], Condition]  # the text encoder
    parse: Callable[
        [str], list[tuple[str, float]]
    ]  # a prompt to the texts and weights of its parts


@dataclass(frozen=True)
class Conditioning:
    """The conditions that a guidance steers towards (`positive`) and away from (`negative`)."""

    positive: Condition
    negative: Condition
    prompts: GuidancePrompts | None = None
    network_timestep: NetworkTimestep = Schedule.timestep  # of the sampler, for other networks

    def require_prompts(self, reader: str) -> GuidancePrompts:
        """The prompts; ValueError without them, which names the guidance that reads them."""
        if self.prompts is None:
            raise ValueError(f"{reader} reads the prompts: give Conditioning(prompts=...)")
        return self.prompts
