"""Guidance with one scale for the text and one for the style image."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.diffusion.conditioning import Conditioning
from ldm.diffusion.guidance.base import ConditionalDenoiser, Denoise, restrict_to_interval
from ldm.diffusion.guidance.cfg import ClassifierFreeGuidance


@dataclass(frozen=True, kw_only=True)
class StyleGuidance(ClassifierFreeGuidance):
    """x0_hat = uncond + scale (text - uncond) + style_scale (both - text).

    Classifier-free guidance by two conditions, the text and, given the text, the style image
    (Brooks et al. 2023, InstructPix2Pix, arXiv:2211.09800, section 3.2.1, with the two conditions
    in the other order). A step costs three calls of the network. Equal scales, or no style image,
    give `ClassifierFreeGuidance`.
    """

    style_scale: float = 2.0

    def __call__(self, denoise: ConditionalDenoiser, conditioning: Conditioning) -> Denoise:
        cond, uncond = conditioning.positive, conditioning.negative
        if cond.style is None:
            return super().__call__(denoise, conditioning)
        every = uncond.cat(replace(cond, style=uncond.style)).cat(cond)

        def plain(x_t: Tensor, t: Tensor) -> Tensor:
            return denoise(x_t, t, cond)

        if self.scale == self.style_scale == 1:
            return plain

        def guided(x_t: Tensor, t: Tensor) -> Tensor:
            times = t if t.ndim == 0 else torch.cat([t] * 3)
            x0_uncond, x0_text, x0_both = denoise(torch.cat([x_t] * 3), times, every).chunk(3)
            towards = self.scale * (x0_text - x0_uncond) + self.style_scale * (x0_both - x0_text)
            return self.rescale_output(x0_uncond + towards, x0_both, x_t, t)

        return restrict_to_interval(self.interval, guided, plain)
