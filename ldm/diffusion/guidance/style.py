"""Guidance with a scale for the words and one for the style picture.

Shapes: B batch, C latent channels, h w latent grid.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.diffusion.conditioning import Condition
from ldm.diffusion.guidance.base import (
    ClassifierFreeGuidance,
    ConditionalDenoiser,
    Denoise,
    GuidancePrompts,
    restrict_to_interval,
)


@dataclass(frozen=True, kw_only=True)
class StyleGuidance(ClassifierFreeGuidance):
    """Classifier-free guidance by two conditions, the text and, given the text, the style picture.

    x0_hat = uncond + scale (text - uncond) + style_scale (both - text), which with equal scales is
    ClassifierFree (Brooks et al. 2023, InstructPix2Pix, arXiv:2211.09800, section 3.2.1, for two
    conditions in the other order). Costs three calls of the network a step. Without a style picture
    it is ClassifierFree by the text.
    """

    style_scale: float = 2.0

    def __call__(
        self,
        denoise: ConditionalDenoiser,
        cond: Condition,
        uncond: Condition,
        words: GuidancePrompts | None = None,
    ) -> Denoise:
        if cond.style is None:
            return super().__call__(denoise, cond, uncond, words)
        told = replace(cond, style=uncond.style)  # by the text alone
        every = uncond.cat(told).cat(cond)

        def plain(x_t: Tensor, t: Tensor) -> Tensor:
            return denoise(x_t, t, cond)

        if self.scale == self.style_scale == 1:
            return plain

        def guided(x_t: Tensor, t: Tensor) -> Tensor:
            each = t if t.ndim == 0 else torch.cat([t] * 3)
            x0_uncond, x0_text, x0_both = denoise(torch.cat([x_t] * 3), each, every).chunk(3)
            towards = self.scale * (x0_text - x0_uncond) + self.style_scale * (x0_both - x0_text)
            return self.rescale_output(x0_uncond + towards, x0_both, x_t, t)

        return restrict_to_interval(self.interval, guided, plain)
