"""Guidance with one scale for the text and one for the style image."""

from dataclasses import dataclass, replace

from torch import Tensor

from ldm.diffusion.conditioning import Conditioning
from ldm.diffusion.guidance.base import ConditionalDenoiser, Denoise
from ldm.diffusion.guidance.cfg import ClassifierFreeGuidance


@dataclass(frozen=True, kw_only=True)
class StyleGuidance(ClassifierFreeGuidance):
    """x0_hat = uncond + scale (text - uncond) + style_scale (both - text).

    Classifier-free guidance by two conditions, the text and, given the text, the style image
    (Brooks et al. 2023, InstructPix2Pix, arXiv:2211.09800, section 3.2.1, with the two conditions
    in the other order). A step costs three calls of the network.
    """

    style_scale: float = 2.0

    def __call__(self, denoise: ConditionalDenoiser, conditioning: Conditioning) -> Denoise:
        cond, uncond = conditioning.positive, conditioning.negative
        if cond.style is None:
            return super().__call__(denoise, conditioning)
        if self.scale == self.style_scale == 1:
            return lambda x_t, t: denoise(x_t, t, cond)

        def combine(t: Tensor, x0_uncond: Tensor, x0_text: Tensor, x0_both: Tensor) -> Tensor:
            towards = self.scale * (x0_text - x0_uncond) + self.style_scale * (x0_both - x0_text)
            return x0_uncond + towards

        text_only = replace(cond, style=uncond.style)
        return self.guide_by_conditions(denoise, [uncond, text_only, cond], combine)
