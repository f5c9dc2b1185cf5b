from dataclasses import replace
from itertools import product

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from ldm.diffusion.conditioning import Condition, Conditioning, GuidancePrompts
from ldm.diffusion.guidance.cfg import (
    AdaptiveProjectedGuidance,
    Autoguidance,
    ClassifierFreeGuidance,
)
from ldm.diffusion.guidance.compositional import CompositionalGuidance
from ldm.diffusion.guidance.style import StyleGuidance
from ldm.diffusion.objective import Objective
from ldm.diffusion.predictions import PREDICTIONS, Prediction
from ldm.diffusion.samplers.ddim import DDIMSampler
from ldm.diffusion.samplers.edm import EDMSampler
from ldm.diffusion.samplers.inversion import invert_ddim
from ldm.diffusion.samplers.multistep import DPMSolverSampler, UniPCSampler
from ldm.diffusion.samplers.repaint import RePaintSampler
from ldm.diffusion.schedules import FlowSchedule, linear
from ldm.diffusion.timesteps import PowerTimestepSampler
from ldm.diffusion.weightings import UniformWeighting
from ldm.inference.prompts import parse_prompt


def cond(value, n=2):
    return Condition(tokens=torch.full((n, 3, 5), value))


def denoise(x_t, t, c):
    return x_t * 0.5 + c.tokens.mean((1, 2))[:, None, None, None] + t.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("t", [torch.tensor(0.5), torch.tensor([0.25, 0.75])])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5])
def test_classifier_free_guidance_guides_every_channel(scale, t):
    x_t = torch.randn(2, 7, 4, 4)
    guided = ClassifierFreeGuidance(scale=scale)(denoise, Conditioning(cond(2.0), cond(0.5)))(
        x_t, t
    )
    u, c = denoise(x_t, t, cond(0.5)), denoise(x_t, t, cond(2.0))
    torch.testing.assert_close(guided, u + scale * (c - u))


def test_scale_one_calls_the_network_once():
    batches = []

    def counted(x_t, t, c):
        batches.append(len(x_t))
        return denoise(x_t, t, c)

    ClassifierFreeGuidance(scale=1.0)(counted, Conditioning(cond(2.0), cond(0.5)))(
        torch.zeros(2, 1, 1, 1), torch.tensor(1.0)
    )
    assert batches == [2]


def test_guiding_x0_equals_guiding_eps():
    alpha, sigma = linear()(torch.tensor([0.6, 0.6], dtype=torch.float64))
    x_t, u, c = torch.randn(3, 2, 4, 2, 2, dtype=torch.float64)
    to_x0 = Prediction("eps").to_x0
    guided_eps = to_x0(u + 4 * (c - u), x_t, alpha, sigma)
    guided_x0 = to_x0(u, x_t, alpha, sigma).lerp(to_x0(c, x_t, alpha, sigma), 4)
    torch.testing.assert_close(guided_eps, guided_x0)


def test_conditions_with_different_parts_do_not_merge():
    keep = torch.tensor([True, False])
    picture = torch.ones(2, 1, 2, 2)
    mixed = Condition(cond(2.0).tokens, concat=picture).where(keep, cond(0.5))
    assert mixed.tokens[:, 0, 0].tolist() == [2.0, 0.5]
    assert mixed.concat is picture
    with pytest.raises(ValueError, match="pooled"):
        cond(1.0).cat(Condition(tokens=cond(1.0).tokens, pooled=torch.zeros(2, 4)))


TIMES = [torch.tensor(0.5), torch.tensor([0.25, 0.75])]


@pytest.mark.parametrize("guidance", [ClassifierFreeGuidance, AdaptiveProjectedGuidance])
def test_scale_one_is_conditional_sampling_bit_for_bit(guidance):
    """Through a whole sampling, whatever else is set."""
    schedule, x = linear(), torch.randn(2, 3, 4, 4)

    def sampled(denoise):
        grid = DDIMSampler().timesteps(schedule, 7)
        return DDIMSampler()(denoise, x, schedule, grid, noise=torch.zeros_like)

    def network(x_t, t, c):
        return torch.tanh(x_t * 0.7 + c.tokens.mean((1, 2))[:, None, None, None] * t)

    guided = guidance(scale=1.0, rescale=0.7, interval=[0.1, 0.6])(
        network, Conditioning(cond(2.0), cond(0.5))
    )
    assert torch.equal(sampled(guided), sampled(lambda x_t, t: network(x_t, t, cond(2.0))))


def test_outside_of_the_interval_it_is_the_conditional_model_at_half_the_cost():
    x_t, batches = torch.randn(2, 3, 4, 4), []

    def counted(x_t, t, c):
        batches.append(len(x_t))
        return denoise(x_t, t, c)

    some = ClassifierFreeGuidance(scale=3.0, interval=[0.3, 0.7])(
        counted, Conditioning(cond(2.0), cond(0.5))
    )
    always = ClassifierFreeGuidance(scale=3.0)(denoise, Conditioning(cond(2.0), cond(0.5)))
    for t, inside in ((0.0, False), (0.29, False), (0.3, True), (0.7, True), (1.0, False)):
        t = torch.tensor(t)
        expected = always(x_t, t) if inside else denoise(x_t, t, cond(2.0))
        assert torch.equal(some(x_t, t), expected)
    assert batches == [2, 2, 4, 4, 2]
    t = torch.tensor([0.5, 0.9])
    mixed = torch.stack([always(x_t, t)[0], denoise(x_t, t, cond(2.0))[1]])
    assert torch.equal(some(x_t, t), mixed)


@pytest.mark.parametrize("t", [torch.tensor(0.9), torch.tensor([0.05, 0.6])])
@pytest.mark.parametrize(
    ("schedule", "kind"),
    [*product([linear()], PREDICTIONS), *product([FlowSchedule()], ("x0", "v", "flow"))],
)
def test_rescaling_is_that_of_the_paper(schedule, kind, t):
    """diffusers' own function on what the network says, whatever that is."""
    uncond, conditional, x_t = torch.randn(3, 2, 4, 8, 8, dtype=torch.float64)
    t = t.double()
    objective = Objective(
        schedule,
        Prediction(kind),
        weighting=UniformWeighting(),
        timestep_sampler=PowerTimestepSampler(1.0),
    )
    out = uncond + 7.5 * (conditional - uncond)

    def denoise(x_t, t, cond):
        return objective.predict_x0(lambda *_: torch.cat([uncond, conditional]), x_t, t, cond)

    for share in (0.0, 0.4, 0.7, 1.0):
        theirs = rescale_noise_cfg(out, conditional, share)
        expected = objective.predict_x0(lambda *_, out=theirs: out, x_t, t, None)
        guidance = ClassifierFreeGuidance(
            scale=7.5, rescale=share, x0_at_zero_output=objective.x0_at_zero_output
        )
        found = guidance(denoise, Conditioning(cond(2.0), cond(0.5)))(x_t, t)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_all_guidance_of_classifier_free_kind_rescales_the_output():
    """The output deviates as the conditional one does, also with parts of prompts and styles."""
    alpha, sigma = linear()(torch.tensor(0.6).double())
    x_t = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    style, none = torch.ones(2, 3, 3).double(), torch.zeros(2, 3, 3).double()
    words = GuidancePrompts(["a AND b", "c"], lambda texts: cond(1.5, n=len(texts)), parse_prompt)
    fixed = torch.randn(2, 4, 8, 8, dtype=torch.float64)

    def network(x_t, told):
        """eps, of another shape for each value."""
        many = fixed.repeat(len(x_t) // 2 + 1, 1, 1, 1)[: len(x_t)]
        return (told[:, None, None, None] * many).sin()

    def denoise(x_t, t, c):
        told = c.tokens.double().mean((1, 2))
        told = told if c.style is None else told + c.style.mean((1, 2))
        return (x_t - sigma * network(x_t, told)) / alpha

    def eps(x0_hat):
        return (x_t - alpha * x0_hat) / sigma

    given = {"scale": 9.0, "rescale": 1.0, "x0_at_zero_output": lambda x_t, t: x_t / alpha}
    t = torch.tensor(0.6).double()
    for guidance, with_style in (
        (ClassifierFreeGuidance(**given), False),
        (AdaptiveProjectedGuidance(**given), False),
        (StyleGuidance(style_scale=5.0, **given), True),
        (CompositionalGuidance(**given), False),
    ):
        pair = cond(2.0), cond(0.5)
        if with_style:
            pair = tuple(replace(c, style=s) for c, s in zip(pair, (style, none), strict=True))
        found = eps(guidance(denoise, Conditioning(*pair, words))(x_t, t))
        plain = replace(guidance, scale=1.0, **({"style_scale": 1.0} if with_style else {}))
        like = eps(replace(plain, rescale=0.0)(denoise, Conditioning(*pair, words))(x_t, t))
        torch.testing.assert_close(found.flatten(1).std(1), like.flatten(1).std(1))


def test_projected_guidance_is_diffusers_own_over_several_steps():
    n = 4 * 8 * 8
    settings = {"scale": 6.0, "parallel": 0.3, "momentum": -0.5, "bound": 0.4}
    answers = torch.randn(5, 2, 2, 4, 8, 8, dtype=torch.float64)  # step, (uncond, cond), batch ..
    step = iter(range(5))
    times = torch.linspace(1, 0.2, 5)
    ours = AdaptiveProjectedGuidance(**settings)(
        lambda x_t, t, c: answers[next(step)].flatten(0, 1), Conditioning(cond(2.0), cond(0.5))
    )
    buffer = MomentumBuffer(settings["momentum"])
    for t, (uncond, conditional) in zip(times, answers, strict=True):
        theirs = normalized_guidance(
            conditional,
            uncond,
            settings["scale"] - 1,
            buffer,
            eta=settings["parallel"],
            norm_threshold=settings["bound"] * n**0.5,
            use_original_formulation=True,
        )
        found = ours(torch.zeros(2, 4, 8, 8), t)
        torch.testing.assert_close(found, theirs, rtol=1e-9, atol=1e-9)


def test_projected_guidance_holds_classifier_free_guidance():
    x_t, t = torch.randn(2, 7, 4, 4, dtype=torch.float64), torch.tensor(0.5)
    same = AdaptiveProjectedGuidance(scale=3.5, parallel=1.0, momentum=0.0)(
        denoise, Conditioning(cond(2.0), cond(0.5))
    )
    for _ in range(2):
        torch.testing.assert_close(
            same(x_t, t),
            ClassifierFreeGuidance(scale=3.5)(denoise, Conditioning(cond(2.0), cond(0.5)))(x_t, t),
        )


def test_momentum_starts_anew_for_each_image():
    guidance, x_t, t = (
        AdaptiveProjectedGuidance(scale=3.0),
        torch.randn(2, 3, 4, 4),
        torch.tensor(0.5),
    )
    first, again = (guidance(denoise, Conditioning(cond(2.0), cond(0.5))) for _ in range(2))
    before = first(x_t, t)
    assert not torch.equal(first(x_t, t / 2), again(x_t, t / 2))
    assert torch.equal(first(x_t, t), before)


TEN_STEPS = {
    "ddim": DDIMSampler(),
    "dpmpp_2m": DPMSolverSampler(),
    "unipc": UniPCSampler(),
    "heun": EDMSampler(),
    "heun, karras": EDMSampler(spacing="karras"),
    "heun, churn": EDMSampler(churn=2.0),
    "euler, churn": EDMSampler(order=1, churn=30.0),
    "rounds": RePaintSampler(DDIMSampler(eta=1.0), 3),
    "rounds of heun": RePaintSampler(EDMSampler(), 3),
    "rounds of heun, churn": RePaintSampler(EDMSampler(churn=2.0), 3),
}


@pytest.mark.parametrize("name", [*TEN_STEPS, "inversion"])
def test_momentum_advances_once_a_step(name):
    """Of a difference that is always 1 it makes 1 + m + m^2 .., a term a step."""

    def network(x_t, t, c):
        return c.tokens.mean((1, 2))[:, None, None, None].expand_as(x_t)

    guided = AdaptiveProjectedGuidance(scale=2.0, parallel=1.0, momentum=0.5)(
        network, Conditioning(cond(2.0), cond(1.0))
    )
    seen, schedule = [], linear()
    x = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    sampler = TEN_STEPS.get(name, DDIMSampler())
    more = {"on_step": lambda i, x0_hat: seen.append(float(x0_hat.mean()) - 2)}
    for _ in range(2):  # a second way begins anew
        seen.clear()
        times = sampler.timesteps(schedule, 10)
        if name == "inversion":
            guided = AdaptiveProjectedGuidance(scale=2.0, parallel=1.0, momentum=0.5)(
                network, Conditioning(cond(2.0), cond(1.0))
            )
            invert_ddim(guided, x, schedule, times, **more)
        else:
            sampler(guided, x, schedule, times, noise=torch.randn_like, **more)
        assert seen == pytest.approx([2 - 0.5**i for i in range(10)])


@pytest.mark.parametrize("t", TIMES)
def test_autoguidance_extrapolates_from_the_worse_model(t):
    x_t = torch.randn(2, 3, 4, 4)

    def worse(x_t, t, c, network_timestep):
        return denoise(x_t, t, c) + 0.1 * x_t

    inner = ClassifierFreeGuidance(scale=2.0)
    auto = Autoguidance(guide=worse, inner=inner, scale=3.0)(
        denoise, Conditioning(cond(2.0), cond(0.5))
    )
    better = inner(denoise, Conditioning(cond(2.0), cond(0.5)))(x_t, t)
    bad = worse(x_t, t, cond(2.0), None)
    torch.testing.assert_close(auto(x_t, t), bad + 3 * (better - bad))
    off = Autoguidance(guide=None, inner=inner, scale=1.0)(
        denoise, Conditioning(cond(2.0), cond(0.5))
    )
    assert torch.equal(off(x_t, t), better)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClassifierFreeGuidance(interval=[0.5, 0.5]), "two rising times"),
        (lambda: ClassifierFreeGuidance(interval=[0.5]), "two rising times"),
        (lambda: ClassifierFreeGuidance(interval=0.5), "interval=0.5 must be two rising times"),
        (lambda: ClassifierFreeGuidance(interval=[0, 2]), "two rising times"),
        (lambda: ClassifierFreeGuidance(rescale=1.5), "rescale goes from 0"),
        (lambda: AdaptiveProjectedGuidance(momentum=-1.0), "never fade"),
        (lambda: AdaptiveProjectedGuidance(bound=0.0), "above 0"),
        (lambda: Autoguidance(guide=None, inner=None, interval=[1, 0]), "two rising times"),
    ],
)
def test_impossible_guidance_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
