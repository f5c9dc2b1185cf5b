"""Guidance by prompts of several parts, each with a weight."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.diffusion.conditioning import IMAGE_PARTS, Conditioning, GuidancePrompts
from ldm.diffusion.guidance.base import ConditionalDenoiser, Denoise, restrict_to_interval
from ldm.diffusion.guidance.cfg import ClassifierFreeGuidance
from ldm.diffusion.schedules import expand_dims_like


@dataclass(frozen=True, kw_only=True)
class CompositionalGuidance(ClassifierFreeGuidance):
    """x0_hat = uncond + scale sum_k weight_k (cond_k - uncond).

    AND multiplies the distributions of the parts, NOT divides by one (Liu et al. 2022,
    arXiv:2206.01714, section 3). Each part costs a call of the network.
    """

    def __call__(self, denoise: ConditionalDenoiser, conditioning: Conditioning) -> Denoise:
        prompts = conditioning.require_prompts("compositional guidance")
        parsed = [prompts.parse(text) for text in prompts.texts]
        if all(len(parts) == 1 and parts[0][1] == 1 for parts in parsed):
            return super().__call__(denoise, conditioning)
        cond, uncond = conditioning.positive, conditioning.negative
        texts = [text for parts in parsed for text, _ in parts]
        # K parts of all prompts together
        weights = torch.tensor([weight for parts in parsed for _, weight in parts])  # (K,)
        rows = torch.tensor([i for i, parts in enumerate(parsed) for _ in parts])  # (K,), images
        images = {name: getattr(cond, name) for name in IMAGE_PARTS}
        images = {name: part if part is None else part[rows] for name, part in images.items()}
        encoded = replace(prompts.encode(texts), **images)
        every = uncond.cat(encoded)

        def denoise_at_scale(x_t: Tensor, t: Tensor, scale: float) -> Tensor:
            image = rows.to(x_t.device)
            times = t if t.ndim == 0 else torch.cat([t, t[rows.to(t.device)]])
            x0_hat = denoise(torch.cat([x_t, x_t[image]]), times, every)
            x0_uncond, x0_parts = x0_hat.split([len(x_t), len(rows)])
            factors = expand_dims_like(weights, x0_parts).to(x_t.dtype)
            differences = factors * (x0_parts - x0_uncond[image])
            x0_cond = x0_uncond.index_add(0, image, differences)  # at scale 1
            x0_hat = x0_uncond + scale * (x0_cond - x0_uncond)
            return self.rescale_output(x0_hat, x0_cond, x_t, t)

        return restrict_to_interval(
            self.interval,
            lambda x_t, t: denoise_at_scale(x_t, t, self.scale),
            lambda x_t, t: denoise_at_scale(x_t, t, 1.0),
        )

    def reads_negative(self, prompts: GuidancePrompts) -> bool:
        totals = (sum(weight for _, weight in prompts.parse(text)) for text in prompts.texts)
        return any(self.scale * total != 1 for total in totals)
