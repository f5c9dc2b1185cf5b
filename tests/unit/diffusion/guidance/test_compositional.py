"""Guidance by the parts of a prompt."""

import pytest
import torch

from ldm.diffusion.conditioning import Condition, Conditioning, GuidancePrompts
from ldm.diffusion.guidance.cfg import ClassifierFreeGuidance
from ldm.diffusion.guidance.compositional import CompositionalGuidance
from ldm.inference.prompts import parse_prompt


def encode(captions):
    """Three numbers a caption, out of its letters."""
    rows = [[sum(map(ord, caption)) % 7, len(caption), caption.count("a")] for caption in captions]
    return Condition(pooled=torch.tensor(rows, dtype=torch.float64))


def denoise(x_t, t, cond):
    told = torch.tanh(cond.pooled.sum(1) / 9)[:, None, None, None]
    place = 0 if cond.concat is None else cond.concat.mean((1, 2, 3), keepdim=True)
    return 0.3 * x_t + told + place + t.reshape(-1, 1, 1, 1)


def composed(prompts, x_t, t, **settings):
    cond, uncond = encode([p.split(" AND ")[0] for p in prompts]), encode([""] * len(prompts))
    picture = torch.arange(len(prompts), dtype=torch.float64)[:, None, None, None].expand(
        -1, 1, 4, 4
    )
    cond, uncond = (Condition(pooled=each.pooled, concat=picture) for each in (cond, uncond))
    words = GuidancePrompts(prompts, encode, parse_prompt)
    return CompositionalGuidance(**settings)(denoise, Conditioning(cond, uncond, words))(x_t, t), (
        cond,
        uncond,
    )


@pytest.mark.parametrize("t", [torch.tensor(0.4), torch.tensor([0.1, 0.4, 0.9])])
def test_parts_are_added_with_their_weights(t):
    x_t = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    prompts = ["a cat", "a cat AND a hat :0.5", "a mat NOT a bat AND a rat :2"]
    found, (cond, _) = composed(prompts, x_t, t, scale=3.0)
    for i, prompt in enumerate(prompts):

        def alone(texts, i=i):
            told = Condition(pooled=encode(texts).pooled, concat=cond.concat[i : i + 1])
            return denoise(x_t[i : i + 1], t if t.ndim == 0 else t[i : i + 1], told)

        empty = alone([""])
        truth = empty + 3 * sum(w * (alone([text]) - empty) for text, w in parse_prompt(prompt))
        torch.testing.assert_close(found[i : i + 1], truth)


def test_one_part_is_classifier_free_guidance_bit_for_bit():
    x_t, t = torch.randn(2, 2, 4, 4, dtype=torch.float64), torch.tensor(0.3)
    found, pair = composed(["a cat", "a dog"], x_t, t, scale=4.0, rescale=0.5)
    assert torch.equal(
        found, ClassifierFreeGuidance(scale=4.0, rescale=0.5)(denoise, Conditioning(*pair))(x_t, t)
    )


def test_and_is_the_product_of_what_both_allow():
    """Of normal distributions: means of posteriors of a product, in closed form, at one noise."""
    # For p(x|c) = N(m_c, 1) and p(x) = N(0, 1), sum of differences of posterior means is that of
    # the product p(x) prod p(x|c)/p(x) = N(sum m_c, 1).
    alpha, sigma = 0.6, 0.8

    def gaussian(x_t, t, cond):
        mean = cond.pooled[:, :, None, None]
        return mean + alpha / (alpha**2 + sigma**2) * (x_t - alpha * mean)

    means = {"": 0.0, "a": 1.5, "b": -0.7}

    def told(captions):
        return Condition(pooled=torch.tensor([[means[c]] for c in captions], dtype=torch.float64))

    x_t = torch.randn(1, 1, 1, 1, dtype=torch.float64)
    words = GuidancePrompts(["a AND b"], told, parse_prompt)
    found = CompositionalGuidance(scale=1.0)(
        gaussian, Conditioning(told(["a"]), told([""]), words)
    )(x_t, torch.tensor(0.5))
    product = Condition(pooled=torch.tensor([[0.8]], dtype=torch.float64))
    torch.testing.assert_close(found, gaussian(x_t, None, product))


def test_prompts_are_needed():
    with pytest.raises(ValueError, match="compositional guidance reads the prompts"):
        CompositionalGuidance()(denoise, Conditioning(encode(["a"]), encode([""])))
