"""Guidance by gradients, against the mixture whose classifier and conditionals are exact."""

import mixture
import pytest
import torch
from scipy.stats import ks_1samp, norm

from ldm.diffusion.conditioning import Condition, Conditioning, GuidancePrompts
from ldm.diffusion.guidance.cfg import ClassifierFreeGuidance
from ldm.diffusion.guidance.gradient import ClassifierGuidance, ClipGuidance
from ldm.diffusion.samplers.ddim import DDIMSampler
from ldm.diffusion.schedules import FlowSchedule, LaplaceSchedule, cosine, linear

NONE = ClassifierFreeGuidance(scale=1.0)
WORDS = GuidancePrompts(["0", "1", "2", "1"], None, None)
EMPTY = Condition()


def marginal(schedule):
    """The ideal denoiser without a condition, as a network that is told one."""
    ideal = mixture.ideal_denoiser(schedule)
    return lambda x_t, t, cond: ideal(x_t, t)


def exact(schedule):
    """log p(component | x_t), the prompt being the component's number."""

    def classify(prompts):
        wanted = torch.tensor([int(prompt) for prompt in prompts])

        def log_p(x_t, t):
            alpha, sigma = schedule(t)
            var = alpha**2 * mixture.STD**2 + sigma**2
            distance = (x_t[:, None, :, 0, 0] - alpha * mixture.MEANS).square().sum(-1)
            log_joint = mixture.WEIGHTS.log() - distance / (2 * var)
            return log_joint.log_softmax(1)[torch.arange(len(x_t)), wanted]

        return log_p

    return classify


def of_component(schedule, wanted):
    """x_t, t -> E[x0 | x_t, component]."""
    means = mixture.MEANS[wanted][:, :, None, None]

    def denoise(x_t, t):
        alpha, sigma = schedule(t)
        gain = alpha * mixture.STD**2 / (alpha**2 * mixture.STD**2 + sigma**2)
        return means + gain * (x_t - alpha * means)

    return denoise


@pytest.mark.parametrize("schedule", [linear(), FlowSchedule()], ids=["linear", "flow"])
@pytest.mark.parametrize("t", [0.05, 0.4, 0.9, 0.995])
def test_the_exact_classifier_gives_the_conditional_denoiser(schedule, t):
    x_t = torch.randn(4, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    guidance = ClassifierGuidance(
        classifier=exact(schedule), schedule=schedule, inner=NONE, scale=1.0
    )
    t = torch.tensor(t, dtype=torch.float64)
    with torch.no_grad():  # as samplers call it
        steered = guidance(marginal(schedule), Conditioning(EMPTY, EMPTY, WORDS))(x_t, t)
    truth = of_component(schedule, [0, 1, 2, 1])(x_t, t)
    torch.testing.assert_close(steered, truth, rtol=1e-6, atol=1e-6)


BARELY_ANY_SIGNAL = {
    "linear": linear(),
    "linear to nothing": linear(zero_terminal_snr=True),
    "cosine": cosine(),
    "cosine to nothing": cosine(zero_terminal_snr=True),
    "flow": FlowSchedule(),
    "flow, shifted": FlowSchedule(shift=3.0),
    "laplace": LaplaceSchedule(),
}


@pytest.mark.parametrize("schedule", BARELY_ANY_SIGNAL.values(), ids=BARELY_ANY_SIGNAL)
def test_classifier_guidance_is_right_from_pure_noise_on(schedule):
    """Bayes' posterior at the noisiest times, and what one step from pure noise paints."""
    n, generator = 300, torch.Generator().manual_seed(1)
    x_t = torch.randn(n, 2, 1, 1, dtype=torch.float64, generator=generator)
    wanted = [i % 3 for i in range(n)]
    guidance = ClassifierGuidance(classifier=exact(schedule), schedule=schedule, inner=NONE)
    steered = guidance(
        marginal(schedule),
        Conditioning(EMPTY, EMPTY, GuidancePrompts([str(number) for number in wanted], None, None)),
    )
    for t in (1.0, 0.9999, 0.9995, 0.999, 0.99):
        t = torch.tensor(t, dtype=torch.float64)
        truth = of_component(schedule, wanted)(x_t, t)
        with torch.no_grad():
            assert (steered(x_t, t) - truth).abs().max() < 4e-4
    grid = DDIMSampler().timesteps(schedule, 1)
    once = DDIMSampler()(steered, x_t, schedule, grid, noise=None)
    assert (once - of_component(schedule, wanted)(x_t, grid[0])).abs().max() < 4e-4


def test_classifier_guidance_of_an_unconditional_model_samples_the_class():
    """The samples are the component's own normal distribution, along each axis."""
    schedule, n = linear(), 1500
    guidance = ClassifierGuidance(classifier=exact(schedule), schedule=schedule, inner=NONE)
    denoise = guidance(
        marginal(schedule), Conditioning(EMPTY, EMPTY, GuidancePrompts(["1"] * n, None, None))
    )
    x = torch.randn(n, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x0 = DDIMSampler()(denoise, x, schedule, DDIMSampler().timesteps(schedule, 200), noise=None)
    for axis in range(2):
        law = norm(float(mixture.MEANS[1, axis]), mixture.STD)
        assert ks_1samp(x0[:, axis, 0, 0].numpy(), law.cdf).pvalue > 0.01


def test_clip_guidance_takes_the_gradient_through_the_denoiser():
    """Against the derivative of its opinion by differences."""
    schedule, t = linear(), torch.tensor(0.6, dtype=torch.float64)
    x_t = torch.randn(4, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    denoise = marginal(schedule)
    goal = torch.tensor([1.0, -1.0], dtype=torch.float64).reshape(2, 1, 1)

    def opinion(x0):
        return -(x0 - goal).square().flatten(1).sum(1)

    guidance = ClipGuidance(
        reward_model=lambda prompts: opinion, schedule=schedule, inner=NONE, scale=0.7
    )
    with torch.no_grad():
        moved = guidance(denoise, Conditioning(EMPTY, EMPTY, WORDS))(x_t, t) - denoise(
            x_t, t, EMPTY
        )
    alpha, sigma = schedule(t)
    for axis in range(2):
        h = torch.zeros_like(x_t)
        h[:, axis] = 1e-5
        up, down = (opinion(denoise(x_t + sign * h, t, EMPTY)) for sign in (1, -1))
        slope = 0.7 * sigma**2 / alpha * (up - down) / 2e-5
        torch.testing.assert_close(moved[:, axis, 0, 0], slope, rtol=1e-5, atol=1e-7)


def test_gradient_guidance_composes_and_keeps_to_its_interval():
    """Classifier in classifier: both gradients; outside of its interval, the inner one's alone."""
    schedule = linear()
    x_t = torch.randn(4, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    once = ClassifierGuidance(classifier=exact(schedule), schedule=schedule, inner=NONE)
    late = ClassifierGuidance(
        classifier=exact(schedule), schedule=schedule, inner=once, interval=[0.5, 1.0]
    )
    twice = ClassifierGuidance(classifier=exact(schedule), schedule=schedule, inner=NONE, scale=2.0)
    call = (marginal(schedule), Conditioning(EMPTY, EMPTY, WORDS))
    for t, same in ((0.3, once), (0.5, twice), (0.8, twice)):
        t = torch.tensor(t, dtype=torch.float64)
        torch.testing.assert_close(late(*call)(x_t, t), same(*call)(x_t, t))
    mixed = torch.tensor([0.2, 0.7, 0.7, 0.2], dtype=torch.float64)[:, None, None, None]

    def at(guidance):
        return guidance(lambda x, t, c: x, Conditioning(EMPTY, EMPTY, WORDS))(x_t, mixed.flatten())

    flat = ClassifierGuidance(
        classifier=lambda prompts: lambda x, t: x.flatten(1).sum(1),
        schedule=schedule,
        inner=NONE,
        interval=[0.5, 1.0],
    )
    assert (at(flat) != x_t).flatten(1).any(1).tolist() == [False, True, True, False]


def test_gradient_guidance_is_finite_without_signal_and_off_at_scale_zero():
    schedule = FlowSchedule()
    x_t = torch.randn(4, 2, 1, 1, dtype=torch.float64)
    guidance = ClassifierGuidance(classifier=exact(schedule), schedule=schedule, inner=NONE)
    assert (
        guidance(marginal(schedule), Conditioning(EMPTY, EMPTY, WORDS))(x_t, torch.tensor(1.0))
        .isfinite()
        .all()
    )
    off = ClassifierGuidance(classifier=exact(schedule), schedule=schedule, inner=NONE, scale=0.0)
    assert torch.equal(
        off(marginal(schedule), Conditioning(EMPTY, EMPTY))(x_t, torch.tensor(0.5)),
        marginal(schedule)(x_t, torch.tensor(0.5), EMPTY),
    )


def test_prompts_are_needed():
    guidance = ClassifierGuidance(classifier=exact(linear()), schedule=linear(), inner=NONE)
    with pytest.raises(ValueError, match="reads the prompts"):
        guidance(marginal(linear()), Conditioning(EMPTY, EMPTY))
    with pytest.raises(ValueError, match=r"interval=\[0.9, 0.1\]"):
        ClipGuidance(reward_model=None, schedule=linear(), inner=NONE, interval=[0.9, 0.1])
