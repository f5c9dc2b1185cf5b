"""From prompts to pictures: what an image depends on, and what is refused."""

from dataclasses import replace

import pytest
import torch
from world import SIZE, pipeline

from ldm.diffusion.guidance.cfg import (
    AdaptiveProjectedGuidance,
    Autoguidance,
    ClassifierFreeGuidance,
)
from ldm.diffusion.guidance.compositional import CompositionalGuidance
from ldm.diffusion.guidance.gradient import ClipGuidance
from ldm.diffusion.samplers.multistep import DPMSolverSampler
from ldm.diffusion.tasks.inpainting import ProjectedInpainting
from ldm.models.autoencoder import IdentityAutoencoder

PROMPTS = ["a red circle", "a blue square", "a white circle"]


def sample(text, prompts=PROMPTS[:1], seeds=(0,), *, scale: float = 3.0, **changes):
    call = {"seeds": list(seeds), "size": SIZE, "steps": 3} | changes
    return pipeline(text, scale=scale, eta=1.0)(prompts, **call)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("negative", ["", "a green square"])
def test_an_image_depends_on_its_own_prompt_and_seed_alone(tiny_text, negative):
    seeds = [3, 1, 4]
    together = sample(tiny_text, PROMPTS, seeds, negative=negative)
    assert together.shape == (3, 3, SIZE, SIZE)
    assert together.abs().max() <= 1
    for i, (prompt, seed) in enumerate(zip(PROMPTS, seeds, strict=True)):
        alone = sample(tiny_text, [prompt], [seed], negative=negative)
        assert distance(alone[0], together[i]) < 1e-5


def test_prompt_seed_and_negative_prompt_change_it(tiny_text):
    first = sample(tiny_text)
    assert distance(first, sample(tiny_text)) == 0
    others = [
        sample(tiny_text, PROMPTS[1:2]),
        sample(tiny_text, seeds=[1]),
        sample(tiny_text, negative="a blue square"),
        sample(tiny_text, scale=4.0),
    ]
    assert min(distance(first, other) for other in others) > 1e-3


def test_an_empty_negative_prompt_is_the_empty_caption(tiny_text):
    """What the denoiser was trained with where captions were dropped."""
    away_from_prompt = sample(tiny_text, [""], scale=3.0, negative="")
    assert distance(away_from_prompt, sample(tiny_text, [""], scale=1.0)) < 1e-5


def test_scale_one_is_the_conditional_model_alone(tiny_text):
    """The negative prompt is not looked at, and the network sees each image once a step."""
    pipe, batches = pipeline(tiny_text, scale=1.0, eta=1.0), []
    pipe.components.denoiser.register_forward_hook(lambda _, args, out: batches.append(len(out)))
    images = pipe(PROMPTS[:2], seeds=[0, 1], size=SIZE, steps=3, negative="a green square")
    assert batches == [2, 2, 2]
    limit = sample(tiny_text, PROMPTS[:2], [0, 1], scale=1 + 1e-7)
    assert distance(images, limit) < 1e-4
    assert distance(images, sample(tiny_text, PROMPTS[:2], [0, 1])) > 1e-3


def test_each_step_is_shown(tiny_text):
    seen = []
    sample(tiny_text, on_step=lambda i, x0: seen.append((i, tuple(x0.shape))))
    assert seen == [(i, (1, 3, SIZE // 2, SIZE // 2)) for i in range(3)]


def test_gradients_are_not_recorded(tiny_text):
    assert not sample(tiny_text).requires_grad


def test_a_size_that_does_not_fit_is_refused(tiny_text):
    with pytest.raises(ValueError, match="size=15 is not a multiple of 2, the autoencoder's fact"):
        sample(tiny_text, size=15)


def test_prompts_and_seeds_are_pairs(tiny_text):
    with pytest.raises(ValueError, match="1 prompts but 2 seeds"):
        sample(tiny_text, seeds=[0, 1])


@pytest.mark.parametrize(
    "extra",
    [
        {"image": torch.zeros(1, 3, SIZE, SIZE)},
        {"mask": torch.zeros(1, 1, SIZE, SIZE)},
        {"strength": 0.5},
    ],
    ids=["image", "mask", "strength"],
)
def test_text_to_image_takes_nothing_else(tiny_text, extra):
    with pytest.raises(ValueError, match="task=text2img takes no image, mask or strength"):
        sample(tiny_text, **extra)


def test_a_picture_goes_to_its_noise_and_back(tiny_text):
    """What is painted of the noise that was found is the picture; with other words, another."""
    pipe = pipeline(tiny_text, scale=1.5).replace_components(autoencoder=IdentityAutoencoder())
    images = 0.8 * torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) - 0.4
    noise = pipe.invert(images, PROMPTS[:1], steps=20)
    assert distance(noise, images) > 0.1
    assert distance(pipe.generate_from_noise(noise, PROMPTS[:1], steps=20), images) < 1e-3
    assert distance(pipe.generate_from_noise(noise, PROMPTS[1:2], steps=20), images) > 1e-2


def test_guidance_is_told_the_prompts(tiny_text):
    pipe, heard = pipeline(tiny_text, scale=1.0), []

    def listening(denoise, conditioning):
        prompts = conditioning.prompts
        heard.append((prompts.texts, prompts.encode(["a red circle"]).tokens))
        return lambda x_t, t: denoise(x_t, t, conditioning.positive)

    pipe = replace(pipe, guidance=listening)
    pipe(PROMPTS[:2], seeds=[0, 1], size=SIZE, steps=2)
    ((prompts, states),) = heard
    assert prompts == PROMPTS[:2]
    assert torch.equal(states, tiny_text(PROMPTS[:1]).tokens)


def test_a_judge_steers_towards_what_it_likes(tiny_text):
    """Bright pictures, asked for through the denoiser."""

    def brightness(prompts):
        return lambda x0_hat: 300 * x0_hat.flatten(1).mean(1)

    plain = pipeline(tiny_text, scale=1.0)
    plain = plain.replace_components(autoencoder=IdentityAutoencoder())
    inner, schedule = plain.guidance, plain.components.objective.schedule
    images = plain(PROMPTS[:2], seeds=[0, 1], size=SIZE, steps=8)
    judged = ClipGuidance(reward_model=brightness, schedule=schedule, inner=inner)
    steered = replace(plain, guidance=judged)(PROMPTS[:2], seeds=[0, 1], size=SIZE, steps=8)
    assert (steered.flatten(1).mean(1) > images.flatten(1).mean(1) + 0.05).all()
    assert not steered.requires_grad


def test_a_gradient_through_the_network_keeps_nothing_for_its_weights(tiny_text):
    leaves = []

    def record(prompts):
        def reward(x0_hat):
            nodes, seen = [x0_hat.grad_fn], set()
            while nodes:
                node = nodes.pop()
                if node is None or node in seen:
                    continue
                seen.add(node)
                nodes += [each for each, _ in node.next_functions]
            leaves.append([each.variable.shape for each in seen if hasattr(each, "variable")])
            return x0_hat.flatten(1).mean(1)

        return reward

    plain = replace(pipeline(tiny_text, scale=1.0), dtype=torch.bfloat16)
    plain.components.denoiser.requires_grad_(False)
    judge = {"schedule": plain.components.objective.schedule, "inner": plain.guidance}
    judged = replace(plain, guidance=ClipGuidance(reward_model=record, **judge))
    judged(PROMPTS[:1], seeds=[0], size=SIZE, steps=2)
    assert leaves == [[(1, 3, SIZE // 2, SIZE // 2)]] * 2, "x_t alone"
    assert not any(each.requires_grad for each in plain.components.denoiser.parameters())


def test_a_word_where_a_negative_prompt_says_nothing(tiny_text):
    """It is told by the guidance that is asked, and the word is true: pictures are the same."""
    pipe = pipeline(tiny_text)

    def guide(x_t, t, cond, network_timestep):
        return pipe.denoise(x_t, t, cond)

    plain, guided = ClassifierFreeGuidance(scale=1.0), ClassifierFreeGuidance(scale=3.0)
    cases = [
        (plain, "a dog", True),
        (guided, "a dog", False),
        (ClassifierFreeGuidance(scale=0.0), "a dog", False),
        (AdaptiveProjectedGuidance(scale=1.0), "a dog", True),
        (Autoguidance(guide=guide, inner=plain, scale=3.0), "a dog", True),
        (Autoguidance(guide=guide, inner=guided, scale=3.0), "a dog", False),
        (CompositionalGuidance(scale=1.0), "a dog", True),
        (CompositionalGuidance(scale=1.0), "a dog AND a cat", False),
        (CompositionalGuidance(scale=2.0), "a dog :0.25 AND a cat :0.25", True),
    ]
    for guidance, prompt, useless in cases:
        pipe = replace(pipe, guidance=guidance)
        words = pipe.collect_warnings(4, prompts=[prompt], negative="red")
        assert words == pipe.collect_warnings(4, prompts=[prompt]) + words[: int(useless)]
        assert ("negative= has no effect" in "".join(words)) == useless
        how = {"seeds": [0], "size": 16, "steps": 2}
        one, other = (pipe([prompt], negative=text, **how) for text in ("", "red"))
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0) if useless else None
        assert useless or not torch.equal(one, other)


def test_a_word_for_a_sampler_that_overshoots_at_these_steps(tiny_text):
    pipe = pipeline(tiny_text)
    assert pipe.collect_warnings(30) == []
    pipe = replace(pipe, sampler=DPMSolverSampler(eta=1.0, spacing="leading"))
    (word,) = pipe.collect_warnings(30)
    assert "overshoots in 30 steps with spacing=leading" in word
    pipe = pipe.replace_components(task=ProjectedInpainting(rounds=2))  # of first order
    assert pipe.collect_warnings(30) == []


def test_a_word_for_a_size_that_was_not_trained(tiny_text):
    pipe = replace(pipeline(tiny_text), trained_size=16)
    assert pipe.collect_warnings(4, size=(16, 16)) == []
    (word,) = pipe.collect_warnings(4, size=(16, 32))
    assert word.startswith("size=[16,32]: this run was trained on images of 16 pixels")
