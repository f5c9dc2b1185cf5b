"""Noise schedule, prediction, weighting, timestep sampler, sampler, guidance and task."""

import math
from itertools import pairwise

import torch

from ldm.diffusion.predictions import Prediction
from ldm.diffusion.rng import rand
from ldm.diffusion.samplers.base import Sampler, take_step
from ldm.diffusion.schedules import Schedule
from ldm.diffusion.tasks.text_to_image import TextToImage


class SineSchedule(Schedule):
    """alpha and sigma on a circle, at equal angles of t^power."""

    def __init__(self, *, power: float = 1.0) -> None:
        super().__init__()
        self.power = power

    def forward(self, t):
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        angle = t**self.power * math.pi / 2
        return angle.cos().clamp(min=0), angle.sin()


class NegativeVelocity(Prediction):
    """-v: the network's output has the other sign."""

    def __init__(self) -> None:
        self.kind, self.row = "negative_v", lambda alpha, sigma: (sigma, -alpha)


class BoundedWeighting:
    """The squared error of x0_hat, up to a bound of the SNR."""

    def __init__(self, *, bound: float = 4.0) -> None:
        self.bound = bound

    def __call__(self, snr, gain):
        return snr.clamp(max=self.bound) / gain


class MiddleTimestepSampler:
    """Times around the middle. batch: of an optimizer step, which each timestep sampler gets."""

    def __init__(self, *, batch: int, margin: float = 0.1) -> None:
        self.margin = margin

    def __call__(self, n, generator):
        return self.margin + (1 - 2 * self.margin) * rand(n, generator)


class PlainEulerSampler(Sampler):
    """One step from time to time."""

    def __init__(self, *, spacing: str = "trailing") -> None:
        super().__init__(spacing=spacing)

    def iterate(self, x, path):
        for i, (now, then) in enumerate(pairwise(path.noise_levels)):
            x0_hat = path.x0_hat(x, i)
            x = take_step(x, x0_hat, now, then)
            yield x, x0_hat


class HalfwayGuidance:
    """The mean of the conditional and the unconditional estimate, times strength."""

    def __init__(self, *, strength: float = 1.0) -> None:
        self.strength = strength

    def __call__(self, denoise, conditioning):
        def guided(x_t, t):
            away = denoise(x_t, t, conditioning.negative)
            return away + self.strength * (denoise(x_t, t, conditioning.positive) - away) / 2

        return guided

    def reads_negative(self, prompts):
        return True


class FlatNoise(TextToImage):
    """Text to image, from noise that all channels share."""

    name = "flat_noise"

    def shape_noise(self, eps):
        return eps[:, :1].expand_as(eps).contiguous()
