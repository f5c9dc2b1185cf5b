"""RePaint: each step several times, with fresh noise in between (Lugmayr et al. 2022, 4.2)."""

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ldm.diffusion.guidance.base import Denoise
from ldm.diffusion.samplers.base import Noise, OnStep, Sampler, compute_noise_levels
from ldm.diffusion.samplers.edm import renoise
from ldm.diffusion.schedules import Schedule


@dataclass(frozen=True)
class RePaintSampler:
    """A sampler that takes each step `rounds` times, from where the step began.

    Each step is a sampling process of its own: multistep samplers are of first order here.
    """

    sampler: Sampler
    rounds: int

    def timesteps(self, schedule: Schedule, steps: int, *, start: float = 1.0) -> Tensor:
        return self.sampler.timesteps(schedule, steps, start=start)

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        schedule: Schedule,
        timesteps: Tensor,
        *,
        noise: Noise,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """As `Sampler`; `on_step` gets the x0_hat of each step's last round."""
        sampler = self.sampler.for_single_step(len(timesteps) - 1)
        for i, (now, then) in enumerate(pairwise(compute_noise_levels(schedule, timesteps))):
            for remaining in reversed(range(self.rounds)):
                # The sampler counts its single step as number 0.
                report = on_step and (lambda _, x0_hat, i=i: on_step(i, x0_hat))
                options = {"noise": noise, "on_step": None if remaining else report}
                x_s = sampler(denoise, x, schedule, timesteps[i : i + 2], **options)
                x = renoise(x_s, then, now, noise(x)) if remaining else x_s
        return x
