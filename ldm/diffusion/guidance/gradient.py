"""Guidance by a gradient: towards what something else than the denoiser says of the picture.

By Bayes' rule x0_hat given y is x0_hat + sigma^2 / alpha times the gradient of log p(y | x_t) with
respect to x_t (Dhariwal and Nichol 2021, arXiv:2105.05233, section 4, with Tweedie's formula), on
any schedule. Shapes: B batch, C latent channels, h w latent grid.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.conditioning import Condition
from ldm.diffusion.guidance.base import (
    ConditionalDenoiser,
    Denoise,
    Guidance,
    GuidancePrompts,
    check_guidance_interval,
    restrict_to_interval,
)
from ldm.diffusion.samplers.spacing import find_timesteps_at_ratio
from ldm.diffusion.schedules import Schedule, expand_dims_like

# The least alpha / sigma at which a gradient is taken. Where alpha goes to 0 the gradient goes to 0
# as well and its factor to infinity; their product has a limit. At this ratio it is 3e-4 from that
# limit on the mixture of the tests, and float32 has digits enough for it.
MIN_GRADIENT_SIGNAL = 1e-3

# Prompts, one an image, to a function of x_t (B, C, h, w) and t: log p(prompt | x_t), (B,)
Classify = Callable[[Sequence[str]], Callable[[Tensor, Tensor], Tensor]]
# Prompts, one an image, to a function of x0_hat (B, C, h, w): how well it fits, (B,), as log p
RewardModel = Callable[[Sequence[str]], Callable[[Tensor], Tensor]]
LogProbFunction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # x_t, t -> x0_hat, log p (B,)


@dataclass(frozen=True, kw_only=True)
class GradientGuidance(ABC):
    """What both kinds of steering share. A scale of 1 is Bayes' rule, 0 leaves `inner` as it is.

    inner: the guidance of the denoiser itself. interval: the times that are steered, from 0 (data)
    to 1. Where alpha / sigma is below LEAST_SIGNAL, x_t is taken for one of the time that has it.
    Raises ValueError for an interval that is none.
    """

    schedule: Schedule
    inner: Guidance
    scale: float = 1.0
    interval: Sequence[float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_guidance_interval(self.interval)

    def __call__(
        self,
        denoise: ConditionalDenoiser,
        cond: Condition,
        uncond: Condition,
        words: GuidancePrompts | None = None,
    ) -> Denoise:
        inner = self.inner(denoise, cond, uncond, words)
        if self.scale == 0:
            return inner
        look = self.look(inner, require_prompts(words))
        most = torch.tensor(1 / MIN_GRADIENT_SIGNAL, dtype=torch.float64)
        latest = find_timesteps_at_ratio(
            self.schedule, most
        ).item()  # 1 where all times have more signal

        def steered(x_t: Tensor, t: Tensor) -> Tensor:
            t = t.clamp(max=latest)
            with torch.enable_grad():
                x = x_t.detach().requires_grad_()
                x0_hat, log_p = look(x, t)
                (gradient,) = torch.autograd.grad(log_p.sum(), x)
            alpha, sigma = self.schedule(t.to(x_t.device))
            lean = self.scale * sigma.square() / alpha
            return x0_hat.detach() + expand_dims_like(lean, x_t).to(x_t.dtype) * gradient

        return restrict_to_interval(self.interval, steered, inner)

    def reads_negative(self, prompts: Sequence[str]) -> bool:
        """Whether the inner one does."""
        return self.inner.reads_negative(prompts)

    @abstractmethod
    def look(self, inner: Denoise, prompts: Sequence[str]) -> LogProbFunction:
        """From x_t and t to the inner x0_hat and log p (B,), whose gradient reaches x_t."""


@dataclass(frozen=True, kw_only=True)
class ClassifierGuidance(GradientGuidance):
    """Classifier guidance: the gradient of a classifier that was trained on noisy latents.

    Where the classifier is exact and the scale 1, pictures are of the conditional distribution,
    whether or not the denoiser was ever told of a condition.
    """

    classifier: Classify

    def look(self, inner: Denoise, prompts: Sequence[str]) -> LogProbFunction:
        """The classifier sees x_t itself."""
        opinion = self.classifier(prompts)

        def beside(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():  # the denoiser keeps nothing for a gradient that it has not
                x0_hat = inner(x, t)
            return x0_hat, opinion(x, t)

        return beside


@dataclass(frozen=True, kw_only=True)
class ClipGuidance(GradientGuidance):
    """CLIP guidance: the gradient, through x0_hat, of something that knows clean pictures alone.

    A judge such as CLIP needs no training on noise: what it is shown is the denoiser's own answer,
    and its gradient goes back through the denoiser to x_t (Bansal et al. 2023, Universal Guidance,
    arXiv:2302.07121, section 3.1). A step costs about three calls of the network.
    """

    reward_model: RewardModel

    def look(self, inner: Denoise, prompts: Sequence[str]) -> LogProbFunction:
        """The judge sees what the denoiser makes of x_t."""
        opinion = self.reward_model(prompts)

        def through(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            x0_hat = inner(x, t)
            return x0_hat, opinion(x0_hat)

        return through


def require_prompts(prompts: GuidancePrompts | None) -> Sequence[str]:
    """The prompts to be steered to; ValueError where there are none to be read."""
    if prompts is None:
        raise ValueError("guidance by a gradient reads the prompts: call it with words=Words(...)")
    return prompts.prompts
