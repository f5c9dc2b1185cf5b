"""Classifier-free guidance, adaptive projected guidance and autoguidance."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from ldm.diffusion.conditioning import Condition, Conditioning, GuidancePrompts, NetworkTimestep
from ldm.diffusion.guidance import base
from ldm.diffusion.guidance.base import ConditionalDenoiser, Denoise
from ldm.diffusion.schedules import expand_dims_like

# conditional x0_hat, unconditional x0_hat, t -> the direction of guidance
Difference = Callable[[Tensor, Tensor, Tensor], Tensor]
GuideDenoiser = Callable[[Tensor, Tensor, Condition, NetworkTimestep], Tensor]  # -> x0_hat


@dataclass(frozen=True, kw_only=True)
class ClassifierFreeGuidance:
    """x0_hat = uncond + scale (cond - uncond) (Ho and Salimans 2022).

    This equals guiding eps, because x0_hat is an affine function of the network's output.
    interval: the guided times, from 0 (data) to 1 (noise); at the others, and at scale 1, the
    conditional x0_hat is used, at half the cost (Kynkaanniemi et al. 2024, arXiv:2404.07724, in t).
    rescale: how far, from 0 to 1, the standard deviation of the network's output is moved back to
    that of the conditional output (Lin et al. 2024, arXiv:2305.08891, equations 15 and 16), by
    x0_at_zero_output, the x0_hat of a network output of 0; None if the network predicts x0 itself.
    """

    scale: float = 5.0
    interval: Sequence[float] = (0.0, 1.0)
    rescale: float = 0.0
    x0_at_zero_output: Denoise | None = None

    def __post_init__(self) -> None:
        base.check_guidance_interval(self.interval)
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance.rescale goes from 0 (none) to 1, not {self.rescale}")

    def __call__(self, denoise: ConditionalDenoiser, conditioning: Conditioning) -> Denoise:
        cond = conditioning.positive
        if self.scale == 1:
            return lambda x_t, t: denoise(x_t, t, cond)
        difference = self.difference()

        def combine(t: Tensor, x0_uncond: Tensor, x0_cond: Tensor) -> Tensor:
            return x0_cond + (self.scale - 1) * difference(x0_cond, x0_uncond, t)

        return self.guide_by_conditions(denoise, [conditioning.negative, cond], combine)

    def guide_by_conditions(
        self, denoise: ConditionalDenoiser, conditions: Sequence[Condition], combine: Callable
    ) -> Denoise:
        """A denoiser that combines t and the x0_hat of each condition, the full one last."""
        every, n = reduce(Condition.cat, conditions), len(conditions)
        if all(cond.concat is conditions[0].concat for cond in conditions):
            every = replace(every, copies=n)

        def guide(x_t: Tensor, t: Tensor) -> Tensor:
            times = t if t.ndim == 0 else torch.cat([t] * n)
            x0_hats = denoise(torch.cat([x_t] * n), times, every).chunk(n)
            return self.rescale_output(combine(t, *x0_hats), x0_hats[-1], x_t, t)

        return base.restrict_to_interval(
            self.interval, guide, lambda x_t, t: denoise(x_t, t, conditions[-1])
        )

    def reads_negative(self, prompts: GuidancePrompts) -> bool:
        return self.scale != 1

    def rescale_output(self, x0_hat: Tensor, like: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x0_hat whose network output has, by `rescale`, the deviation of that of `like`."""
        if self.rescale == 0:
            return x0_hat
        # At one x_t the output is a multiple of x0_hat - x0_at_zero_output, the same for both.
        zero = self.x0_at_zero_output(x_t, t) if self.x0_at_zero_output else torch.zeros_like(x_t)
        out, like = x0_hat - zero, like - zero
        ratio = like.flatten(1).std(1) / out.flatten(1).std(1)  # (B,)
        return zero + out * expand_dims_like(1 + self.rescale * (ratio - 1), out)

    def difference(self) -> Difference:
        """The direction of guidance for one sampling process."""
        return lambda x0_cond, x0_uncond, t: x0_cond - x0_uncond


@dataclass(frozen=True, kw_only=True)
class AdaptiveProjectedGuidance(ClassifierFreeGuidance):
    """APG: large scales without oversaturation (Sadat et al. 2024, arXiv:2410.02416, algorithm 1).

    cond - uncond gets `momentum` times its value at the step before; then its root mean square per
    image is limited to `bound` (the paper's threshold over the root of the number of elements);
    then its part parallel to cond, which saturates, is multiplied by `parallel`.
    """

    parallel: float = 0.0
    momentum: float = -0.5
    bound: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 < self.momentum < 1:
            raise ValueError(
                f"guidance.momentum={self.momentum} must lie between -1 and 1: it would never fade"
            )
        if self.bound is not None and self.bound <= 0:
            raise ValueError(f"guidance.bound={self.bound} must be above 0, or null for none")

    def difference(self) -> Difference:
        momentum = Momentum(self.momentum)

        def project(x0_cond: Tensor, x0_uncond: Tensor, t: Tensor) -> Tensor:
            difference = momentum(x0_cond - x0_uncond, float(t.max()))
            if self.bound is not None:
                size = expand_dims_like(difference.square().flatten(1).mean(1).sqrt(), difference)
                difference = difference * (self.bound / size).clamp(max=1)
            tiny = torch.finfo(x0_cond.dtype).tiny
            norm = x0_cond.flatten(1).square().sum(1).clamp(min=tiny)  # (B,), squared
            share = (difference * x0_cond).flatten(1).sum(1) / norm  # (B,)
            return difference - (1 - self.parallel) * expand_dims_like(share, x0_cond) * x0_cond

        return project


class Momentum:
    """A running sum over the steps of one sampling process: new + share * the sum before.

    A step may call it several times (Heun, RePaint, inversion, churn). Each call starts from the
    last sum of an earlier step.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.sums: list[tuple[float, Tensor]] = []  # by time, in the direction of the process

    def __call__(self, added: Tensor, t: float) -> Tensor:
        """The sum at time `t`, of the shape of `added`."""
        upwards = len(self.sums) > 1 and self.sums[1][0] > self.sums[0][0]
        if len(self.sums) == 1:
            before = [each for each in self.sums if each[0] != t]
        else:
            before = [each for each in self.sums if (each[0] < t if upwards else each[0] > t)]
        total = added + self.share * before[-1][1] if before else added
        # A step has three times at most: the raised one, its own, and its end.
        self.sums = [*before[-2:], (t, total)]
        return total


@dataclass(frozen=True, kw_only=True)
class Autoguidance:
    """x0_hat = guide + scale (inner - guide), both with the same condition.

    It removes the errors that both share and keeps the variety (Karras et al. 2024,
    arXiv:2406.02507). guide: a worse model, earlier or smaller, on the same latents and schedule;
    scale 1 does not call it. inner: the guidance of the better model.
    """

    guide: GuideDenoiser
    inner: base.Guidance
    scale: float = 2.0
    interval: Sequence[float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        base.check_guidance_interval(self.interval)

    def __call__(self, denoise: ConditionalDenoiser, conditioning: Conditioning) -> Denoise:
        inner = self.inner(denoise, conditioning)
        if self.scale == 1:
            return inner

        def extrapolate(x_t: Tensor, t: Tensor) -> Tensor:
            worse = self.guide(x_t, t, conditioning.positive, conditioning.network_timestep)
            return torch.lerp(worse, inner(x_t, t), self.scale)

        return base.restrict_to_interval(self.interval, extrapolate, inner)

    def reads_negative(self, prompts: GuidancePrompts) -> bool:
        return self.inner.reads_negative(prompts)
