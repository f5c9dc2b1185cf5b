"""Guidance by the gradient of a classifier or of CLIP.

By Bayes' rule x0_hat given y is x0_hat + sigma^2 / alpha times the gradient of log p(y | x_t) with
respect to x_t (Dhariwal and Nichol 2021, arXiv:2105.05233, section 4, with Tweedie's formula), on
any schedule.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ldm.diffusion.conditioning import Conditioning, GuidancePrompts
from ldm.diffusion.guidance import base
from ldm.diffusion.schedules import Schedule, expand_dims_like

# The smallest alpha / sigma at which a gradient is taken. As alpha goes to 0 the gradient goes to 0
# and its factor to infinity; their product has a limit, and float32 has enough digits here.
MIN_GRADIENT_SIGNAL = 1e-3

# One prompt per image -> a function of x_t (B, C, h, w) and t: log p(prompt | x_t), (B,)
Classify = Callable[[Sequence[str]], Callable[[Tensor, Tensor], Tensor]]
# One prompt per image -> a function of x0_hat (B, C, h, w): how well it fits, (B,), as log p
RewardModel = Callable[[Sequence[str]], Callable[[Tensor], Tensor]]
LogProbFunction = Callable[[Tensor, Tensor, Tensor], Tensor]  # x_t, t, x0_hat -> log p (B,)


@dataclass(frozen=True, kw_only=True)
class GradientGuidance(ABC):
    """Adds scale sigma^2 / alpha times a gradient to the x0_hat of `inner`.

    Scale 1 is Bayes' rule, scale 0 is `inner` alone. inner: the guidance of the denoiser itself.
    interval: the guided times, from 0 (data) to 1 (noise). Where alpha / sigma is below
    MIN_GRADIENT_SIGNAL, x_t is treated as one at the time of that ratio.
    """

    schedule: Schedule
    inner: base.Guidance
    scale: float = 1.0
    interval: Sequence[float] = (0.0, 1.0)
    through_denoiser: ClassVar[bool]  # whether the gradient passes through the denoiser

    def __post_init__(self) -> None:
        base.check_guidance_interval(self.interval)

    def __call__(
        self, denoise: base.ConditionalDenoiser, conditioning: Conditioning
    ) -> base.Denoise:
        inner = self.inner(denoise, conditioning)
        if self.scale == 0:
            return inner
        prompts = conditioning.require_prompts("guidance by a gradient")
        log_prob = self.make_log_prob(prompts.texts)
        ratio = torch.tensor(1 / MIN_GRADIENT_SIGNAL, dtype=torch.float64)
        latest = self.schedule.timesteps_at_ratio(ratio).item()

        def guide(x_t: Tensor, t: Tensor) -> Tensor:
            t = t.clamp(max=latest)
            with torch.enable_grad():
                x = x_t.detach().requires_grad_()
                with torch.set_grad_enabled(self.through_denoiser):
                    x0_hat = inner(x, t)
                (gradient,) = torch.autograd.grad(log_prob(x, t, x0_hat).sum(), x)
            alpha, sigma = self.schedule(t.to(x_t.device))
            factor = expand_dims_like(self.scale * sigma.square() / alpha, x_t)
            return x0_hat.detach() + factor.to(x_t.dtype) * gradient

        return base.restrict_to_interval(self.interval, guide, inner)

    def reads_negative(self, prompts: GuidancePrompts) -> bool:
        return self.inner.reads_negative(prompts)

    @abstractmethod
    def make_log_prob(self, texts: Sequence[str]) -> LogProbFunction:
        """The function whose gradient with respect to x_t guides."""


@dataclass(frozen=True, kw_only=True)
class ClassifierGuidance(GradientGuidance):
    """Classifier guidance: the gradient of a classifier that was trained on noisy latents."""

    classifier: Classify
    through_denoiser = False

    def make_log_prob(self, texts: Sequence[str]) -> LogProbFunction:
        classify = self.classifier(texts)
        return lambda x_t, t, x0_hat: classify(x_t, t)


@dataclass(frozen=True, kw_only=True)
class ClipGuidance(GradientGuidance):
    """CLIP guidance: the gradient, through x0_hat, of a model of clean images.

    The reward model reads the denoiser's x0_hat, so that it needs no training on noise; its
    gradient goes back through the denoiser to x_t (Bansal et al. 2023, Universal Guidance,
    arXiv:2302.07121, section 3.1). A step costs about three calls of the network.
    """

    reward_model: RewardModel
    through_denoiser = True

    def make_log_prob(self, texts: Sequence[str]) -> LogProbFunction:
        reward = self.reward_model(texts)
        return lambda x_t, t, x0_hat: reward(x0_hat)
