"""Guidance with two scales, and what conditions do with their style."""

import pytest
import torch

from ldm.diffusion.conditioning import Condition, Conditioning, GuidancePrompts
from ldm.diffusion.guidance.cfg import ClassifierFreeGuidance
from ldm.diffusion.guidance.compositional import CompositionalGuidance
from ldm.diffusion.guidance.style import StyleGuidance
from ldm.inference.prompts import parse_prompt


def cond(text, style=None, n=2):
    tokens = torch.full((n, 3, 5), float(text))
    return Condition(tokens, style=None if style is None else torch.full((n, 4, 6), float(style)))


def denoise(x_t, t, c):
    """Not additive in text and style, as no network is."""
    text = c.tokens.mean((1, 2))
    style = 0 if c.style is None else c.style.mean((1, 2))
    told = text + 3 * style + 0.7 * text * style
    return x_t * 0.5 + told[:, None, None, None] + t.reshape(-1, 1, 1, 1)


X = torch.randn(2, 7, 4, 4, generator=torch.Generator().manual_seed(0))
TIMES = [torch.tensor(0.5), torch.tensor([0.25, 0.75])]


@pytest.mark.parametrize("t", TIMES)
def test_each_condition_has_its_scale(t):
    found = StyleGuidance(scale=3, style_scale=1.5)(
        denoise, Conditioning(cond(2, 1), cond(0.5, 0))
    )(X, t)
    none, text, both = (denoise(X, t, c) for c in (cond(0.5, 0), cond(2, 0), cond(2, 1)))
    torch.testing.assert_close(found, none + 3 * (text - none) + 1.5 * (both - text))


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("t", TIMES)
def test_equal_scales_are_classifier_free(scale, t):
    more = {"interval": [0.3, 0.9], "rescale": 0.4}
    pair = cond(2, 1), cond(0.5, 0)
    found = StyleGuidance(scale=scale, style_scale=scale, **more)(denoise, Conditioning(*pair))(
        X, t
    )
    torch.testing.assert_close(
        found, ClassifierFreeGuidance(scale=scale, **more)(denoise, Conditioning(*pair))(X, t)
    )


@pytest.mark.parametrize("t", TIMES)
def test_without_a_style_picture_it_is_classifier_free(t):
    pair = cond(2), cond(0.5)
    found = StyleGuidance(scale=3, style_scale=9, rescale=0.3)(denoise, Conditioning(*pair))(X, t)
    assert torch.equal(
        found, ClassifierFreeGuidance(scale=3, rescale=0.3)(denoise, Conditioning(*pair))(X, t)
    )


def test_style_guidance_calls_the_network_no_more_than_needed():
    batches = []

    def counted(x_t, t, c):
        batches.append(len(x_t))
        return denoise(x_t, t, c)

    for scales in ((1, 1), (1, 2), (2, 2)):
        guided = StyleGuidance(scale=scales[0], style_scale=scales[1])(
            counted, Conditioning(cond(2, 1), cond(0, 0))
        )
        guided(X, torch.tensor(0.5))
    assert batches == [2, 6, 6]


def test_where_exchanges_text_and_not_style():
    mixed = cond(2, 1).where(torch.tensor([True, False]), cond(0.5))
    assert mixed.tokens[:, 0, 0].tolist() == [2.0, 0.5]
    assert (mixed.style == 1).all()
    with pytest.raises(ValueError, match="style"):
        cond(2, 1).cat(cond(2))


def test_parts_of_a_prompt_have_the_style_of_their_image():
    seen = []

    def noted(x_t, t, c):
        seen.append(c.style[:, 0, 0].tolist())
        return denoise(x_t, t, c)

    style = torch.tensor([1.0, 2.0])[:, None, None].expand(2, 4, 6)
    told = Condition(cond(2).tokens, style=style)
    words = GuidancePrompts(
        ["a AND b", "c"], lambda captions: cond(1, n=len(captions)), parse_prompt
    )
    CompositionalGuidance(scale=2.0)(noted, Conditioning(told, cond(0, 0), words))(
        X, torch.tensor(0.5)
    )
    assert seen == [[0, 0, 1, 1, 2]]
