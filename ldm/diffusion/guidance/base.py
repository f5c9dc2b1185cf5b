"""Guidance: a denoiser out of a conditional denoiser; it knows no network and guides all channels.

Each guidance is called as guidance(denoise, cond, uncond, words). Those that wrap another have it
as `inner`; gradients are in steering.py, prompts of several parts in composition.py.
Shapes: B batch, C latent channels, h w latent grid.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ldm.diffusion.conditioning import Condition
from ldm.diffusion.schedules import expand_dims_like

Denoise = Callable[[Tensor, Tensor], Tensor]  # x_t (B, C, h, w), t () or (B,) -> x0_hat
ConditionalDenoiser = Callable[[Tensor, Tensor, Condition], Tensor]
Difference = Callable[[Tensor, Tensor, Tensor], Tensor]  # x0_hat with and without cond, t -> to go


@dataclass(frozen=True)
class GuidancePrompts:
    """What was asked for in words, for guidance that reads it for itself.

    prompts: one an image. encode: the text encoder's, captions to a Condition.
    """

    prompts: Sequence[str]
    encode: Callable[[Sequence[str]], Condition]


class Guidance(Protocol):
    """What all guidance is: `uncond` may be of a negative prompt."""

    def __call__(
        self,
        denoise: ConditionalDenoiser,
        cond: Condition,
        uncond: Condition,
        words: GuidancePrompts | None = None,
    ) -> Denoise: ...

    def reads_negative(self, prompts: Sequence[str]) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class ClassifierFreeGuidance:
    """Away from the unconditional answer, towards the conditional one (Ho and Salimans 2022).

    x0_hat = uncond + scale (cond - uncond); scale 1 is the plain conditional model and costs half.
    x0_hat is an affine function of whatever the network predicts, so that this equals guiding eps.
    interval: the times, from 0 (data) to 1, that are guided; elsewhere the conditional answer is
    taken as it is, at half the cost (Kynkaanniemi et al. 2024, arXiv:2404.07724, in t).
    rescale: how far from 0 to 1 the deviation of the network's output is brought back to that of
    the conditional one, which large scales exceed (Lin et al. 2024, arXiv:2305.08891, equations 15
    and 16). at_zero: the x0_hat of a network whose output is 0, which says what the output is of an
    x0_hat; None is for networks that predict x0 itself.
    Raises ValueError for an interval or a rescale that is none.
    """

    scale: float = 5.0
    interval: Sequence[float] = (0.0, 1.0)
    rescale: float = 0.0
    x0_at_zero_output: Denoise | None = None

    def __post_init__(self) -> None:
        check_guidance_interval(self.interval)
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance.rescale goes from 0 (none) to 1, not {self.rescale}")

    def __call__(
        self,
        denoise: ConditionalDenoiser,
        cond: Condition,
        uncond: Condition,
        words: GuidancePrompts | None = None,
    ) -> Denoise:
        def plain(x_t: Tensor, t: Tensor) -> Tensor:
            return denoise(x_t, t, cond)

        if self.scale == 1:
            return plain
        both, difference = uncond.cat(cond), self.difference()

        def guided(x_t: Tensor, t: Tensor) -> Tensor:
            twice = t if t.ndim == 0 else torch.cat([t, t])
            x0_uncond, x0_cond = denoise(torch.cat([x_t, x_t]), twice, both).chunk(2)
            x0_hat = x0_cond + (self.scale - 1) * difference(x0_cond, x0_uncond, t)
            return self.rescale_output(x0_hat, x0_cond, x_t, t)

        return restrict_to_interval(self.interval, guided, plain)

    def reads_negative(self, prompts: Sequence[str]) -> bool:
        """Whether `uncond` counts for anything."""
        return self.scale != 1

    def rescale_output(self, x0_hat: Tensor, like: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x0_hat by `rescale` of the way to where its output deviates as that of `like` does."""
        if self.rescale == 0:
            return x0_hat
        # At one x_t the output is a multiple of the distance from where it is 0, the same for both.
        zero = (
            torch.zeros_like(x_t)
            if self.x0_at_zero_output is None
            else self.x0_at_zero_output(x_t, t)
        )
        return zero + rescale_std(x0_hat - zero, like=like - zero, share=self.rescale)

    def difference(self) -> Difference:
        """Where to go from the conditional answer, for one way from noise to data."""
        return lambda x0_cond, x0_uncond, t: x0_cond - x0_uncond


@dataclass(frozen=True, kw_only=True)
class AdaptiveProjectedGuidance(ClassifierFreeGuidance):
    """Adaptive projected guidance, APG: large scales without burnt colours.

    The difference of the two answers is added to what it was a step before times `momentum`; then
    cut to `bound`; then its part along the conditional answer, which is what saturates, counts
    `parallel` times. `bound` is of the root mean square of an image's elements, so that it fits any
    size; the paper's threshold is that times the root of their number.
    Sadat et al. 2024, arXiv:2410.02416, algorithm 1; with momentum 0, no bound and parallel 1 it is
    classifier-free guidance.
    Raises ValueError for a bound of 0 or less, or a momentum that does not fade.
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
        """As the paper's; the momentum is that of one way from noise to data."""
        momentum = Momentum(self.momentum)

        def projected(x0_cond: Tensor, x0_uncond: Tensor, t: Tensor) -> Tensor:
            difference = momentum(x0_cond - x0_uncond, float(t.max()))
            if self.bound is not None:
                size = expand_dims_like(difference.square().flatten(1).mean(1).sqrt(), difference)
                difference = difference * (self.bound / size).clamp(max=1)
            share = (difference * x0_cond).flatten(1).sum(1) / squared_norm(x0_cond)  # (B,)
            return difference - (1 - self.parallel) * expand_dims_like(share, x0_cond) * x0_cond

        return projected


class Momentum:
    """A sum that fades on one way through time: to what is added comes `share` of a step before.

    A step may ask often: at its end (Heun), in rounds (RePaint, inversion), above its beginning
    (churn). The sum at a time is made anew each time, of the last one before it on the way.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.sums: list[tuple[float, Tensor]] = []  # times in the order of the way

    def __call__(self, added: Tensor, t: float) -> Tensor:
        """The sum at time `t`, of the shape of `added`."""
        upwards = len(self.sums) > 1 and self.sums[1][0] > self.sums[0][0]
        if len(self.sums) == 1:
            before = [each for each in self.sums if each[0] != t]
        else:
            before = [each for each in self.sums if (each[0] < t if upwards else each[0] > t)]
        total = added + self.share * before[-1][1] if before else added
        # A step touches three times at most: where it is raised to, its own, and its end.
        self.sums = [*before[-2:], (t, total)]
        return total


@dataclass(frozen=True, kw_only=True)
class Autoguidance:
    """Away from what a worse model of the same kind says, where both have the same condition.

    x0_hat = guide + scale (inner - guide): what the two share in faults is taken away, and variety
    is kept, which classifier-free guidance costs (Karras et al. 2024, arXiv:2406.02507).
    guide: the worse one, an earlier or a smaller model on the same latents and schedule; scale 1
    does not ask it. inner: the guidance of the better one. interval: as ClassifierFree's.
    Raises ValueError for an interval that is none.
    """

    guide: ConditionalDenoiser
    inner: Guidance
    scale: float = 2.0
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
        if self.scale == 1:
            return inner

        def guided(x_t: Tensor, t: Tensor) -> Tensor:
            return torch.lerp(self.guide(x_t, t, cond), inner(x_t, t), self.scale)

        return restrict_to_interval(self.interval, guided, inner)

    def reads_negative(self, prompts: Sequence[str]) -> bool:
        """Whether the inner one does."""
        return self.inner.reads_negative(prompts)


def restrict_to_interval(interval: Sequence[float], guided: Denoise, plain: Denoise) -> Denoise:
    """`guided` at times in the interval, ends included, `plain` elsewhere; each where needed."""
    low, high = interval
    if low <= 0 and high >= 1:
        return guided

    def chosen(x_t: Tensor, t: Tensor) -> Tensor:
        inside = (low <= t) & (t <= high)
        if bool(inside.all()):
            return guided(x_t, t)
        if not bool(inside.any()):
            return plain(x_t, t)
        return torch.where(expand_dims_like(inside, x_t), guided(x_t, t), plain(x_t, t))

    return chosen


def check_guidance_interval(interval: Sequence[float]) -> None:
    """ValueError unless two rising times from 0 to 1."""
    low, high = interval if isinstance(interval, Sequence) and len(interval) == 2 else (0, 0)
    if not 0 <= low < high <= 1:
        raise ValueError(
            f"guidance.interval={interval} must be two rising times from 0 (data) to 1 (noise), "
            "such as [0.2,0.8]"
        )


def rescale_std(out: Tensor, *, like: Tensor, share: float) -> Tensor:
    """An output (B, ...) with its deviation brought, by `share`, to that of `like`, each image."""
    ratio = like.flatten(1).std(1) / out.flatten(1).std(1)  # (B,)
    return out * expand_dims_like(1 + share * (ratio - 1), out)


def squared_norm(x: Tensor) -> Tensor:
    """The squared length (B,) of each image, never 0."""
    return x.flatten(1).square().sum(1).clamp(min=torch.finfo(x.dtype).tiny)
