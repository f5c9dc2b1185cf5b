"""Prompts of several parts: `a dog AND a red ball :0.5 NOT grass`.

Shapes: B batch, C latent channels, h w latent grid, K parts of all prompts together.
"""

import re
from collections.abc import Sequence
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
from ldm.diffusion.schedules import expand_dims_like

PROMPT_OPERATOR = re.compile(r"(?<!\S)(AND NOT|AND|NOT)(?!\S)")
PROMPT_PART_WEIGHT = re.compile(r"(?<!\S):(\d+\.?\d*|\.\d+)$")


def parse_prompt(prompt: str) -> list[tuple[str, float]]:
    """The parts of a prompt and what each weighs; one part of weight 1 where nothing joins it.

    AND and NOT, in capitals and between blanks, join parts; ` :0.5` at a part's end is its weight,
    1 without one, and NOT turns it around. Raises ValueError where a part has no words.
    """
    first, *rest = PROMPT_OPERATOR.split(prompt)
    joined = [("AND", first)] if first.strip() or not rest else []
    joined += zip(rest[::2], rest[1::2], strict=True)
    parts = []
    for joint, text in joined:
        text = text.strip()
        found = PROMPT_PART_WEIGHT.search(text)
        weight = float(found[1]) if found else 1.0
        words = text[: found.start()].strip() if found else text
        if not words and (rest or found):
            raise ValueError(f"a part of the prompt has no words: '{prompt}'")
        parts.append((words, -weight if "NOT" in joint else weight))
    return parts


@dataclass(frozen=True, kw_only=True)
class CompositionalGuidance(ClassifierFreeGuidance):
    """Classifier-free guidance by the parts of a prompt, each with its weight.

    x0_hat = uncond + scale sum_k weight_k (cond_k - uncond): AND multiplies what the parts allow,
    NOT divides by it (Liu et al. 2022, arXiv:2206.01714, section 3). Costs a call for each part.
    A prompt of one part of weight 1 is ClassifierFree's.
    """

    def __call__(
        self,
        denoise: ConditionalDenoiser,
        cond: Condition,
        uncond: Condition,
        words: GuidancePrompts | None = None,
    ) -> Denoise:
        if words is None:
            raise ValueError("composed prompts are read here: call it with words=Words(...)")
        prompts = [parse_prompt(prompt) for prompt in words.prompts]
        if all(len(parts) == 1 and parts[0][1] == 1 for parts in prompts):
            return super().__call__(denoise, cond, uncond, words)
        texts = [text for parts in prompts for text, _ in parts]
        of_image = [i for i, parts in enumerate(prompts) for _ in parts]
        weights = torch.tensor([weight for parts in prompts for _, weight in parts])  # (K,)
        rows = torch.tensor(of_image)  # (K,)
        both = uncond.cat(encode_prompt_parts(words, texts, cond, of_image))

        def plain(x_t: Tensor, t: Tensor) -> Tensor:
            return summed(x_t, t, 1.0)

        def guided(x_t: Tensor, t: Tensor) -> Tensor:
            return summed(x_t, t, self.scale)

        def summed(x_t: Tensor, t: Tensor, scale: float) -> Tensor:
            image = rows.to(x_t.device)
            each = t if t.ndim == 0 else torch.cat([t, t[rows.to(t.device)]])
            x0_hat = denoise(torch.cat([x_t, x_t[image]]), each, both)
            x0_uncond, x0_parts = x0_hat.split([len(x_t), len(rows)])
            towards = expand_dims_like(weights, x0_parts).to(x_t.dtype) * (
                x0_parts - x0_uncond[image]
            )
            at_one = x0_uncond.index_add(0, image, towards)  # what scale 1 gives
            x0_hat = x0_uncond + scale * (at_one - x0_uncond)
            return self.rescale_output(x0_hat, at_one, x_t, t)

        return restrict_to_interval(self.interval, guided, plain)

    def reads_negative(self, prompts: Sequence[str]) -> bool:
        """Whether, for any prompt, its parts leave something for `uncond`."""
        totals = [sum(weight for _, weight in parse_prompt(prompt)) for prompt in prompts]
        return any(self.scale * total != 1 for total in totals)


def encode_prompt_parts(
    prompts: GuidancePrompts, texts: list[str], cond: Condition, of_image: list[int]
) -> Condition:
    """The condition (K rows) of all parts, each with the extra channels and style of its image."""
    concat, style = (None if part is None else part[of_image] for part in (cond.concat, cond.style))
    return replace(prompts.encode(texts), concat=concat, style=style)
