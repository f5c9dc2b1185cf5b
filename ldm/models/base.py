"""The interfaces of the networks of a pipeline and a training."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ldm.diffusion.conditioning import Condition


class Denoiser(Protocol):
    """A network from noisy latents to the prediction's output.

    in_channels counts extra channels. Height and width of the latents are multiples of `multiple`.
    """

    in_channels: int
    out_channels: int
    multiple: int

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """x (B, C, h, w), t () or (B,) on the scale 0..999 -> (B, out_channels, h, w)."""

    # Optional: project_text(tokens (B, L, D)) -> (B, L, W) or None, which depends on no timestep.
    # Sampling then gives it as cond.projected.


class TextEncoder(Protocol):
    """A frozen encoder of captions.

    width and pooled_width are 0 if the condition has no `tokens` or `pooled`.
    """

    width: int
    pooled_width: int
    max_length: int  # of the tokens, 0 for any
    truncated: int  # the number of captions so far that were cut
    names: Sequence[str]  # that it tells apart; () for an encoder of free text

    def __call__(self, captions: Sequence[str]) -> Condition:
        """Returns the condition of captions (B)."""

    def null(self, n: int) -> Condition:
        """Returns the condition of an empty caption, n times."""
