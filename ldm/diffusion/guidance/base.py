"""The interface of guidance: it makes a denoiser of a conditional denoiser."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ldm.diffusion.conditioning import Condition, Conditioning, GuidancePrompts
from ldm.diffusion.schedules import expand_dims_like

Denoise = Callable[[Tensor, Tensor], Tensor]  # x_t (B, C, h, w), t () or (B,) -> x0_hat
ConditionalDenoiser = Callable[[Tensor, Tensor, Condition], Tensor]


class Guidance(Protocol):
    """Makes the denoiser of one sampling process, for all channels of any network.

    The denoiser may keep state until the process ends. A guidance that wraps another has it as
    `inner`.
    """

    def __call__(self, denoise: ConditionalDenoiser, conditioning: Conditioning) -> Denoise: ...

    def reads_negative(self, prompts: GuidancePrompts) -> bool:
        """Returns whether the negative condition has any effect for these prompts."""


def restrict_to_interval(interval: Sequence[float], guide: Denoise, otherwise: Denoise) -> Denoise:
    """`guide` at times in the interval, ends included, and `otherwise` at the others."""
    low, high = interval
    if low <= 0 and high >= 1:
        return guide

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        inside = (low <= t) & (t <= high)
        if bool(inside.all()):
            return guide(x_t, t)
        if not bool(inside.any()):
            return otherwise(x_t, t)
        return torch.where(expand_dims_like(inside, x_t), guide(x_t, t), otherwise(x_t, t))

    return denoise


def check_guidance_interval(interval: Sequence[float]) -> None:
    """ValueError unless these are two rising times from 0 to 1."""
    low, high = interval if isinstance(interval, Sequence) and len(interval) == 2 else (0, 0)
    if not 0 <= low < high <= 1:
        raise ValueError(
            f"guidance.interval={interval} must be two rising times from 0 (data) to 1 (noise), "
            "such as [0.2,0.8]"
        )
