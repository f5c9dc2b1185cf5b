"""Each step several times, with fresh noise between (Lugmayr et al. 2022, RePaint, section 4.2).

What is forced into x0_hat, such as a picture's known part, and what the denoiser makes of the rest
come to agree. Shapes: B batch, C latent channels, h w latent grid.
"""

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ldm.diffusion.guidance.base import Denoise
from ldm.diffusion.samplers.base import Noise, OnStep, Sampler, compute_noise_levels
from ldm.diffusion.samplers.edm import renoise
from ldm.diffusion.schedules import Schedule


@dataclass(frozen=True)
class RePaintSampler:
    """A sampler that goes each of its steps `rounds` times.

    Between two rounds x is taken back to where the step began. As every step begins anew, samplers
    that look at earlier steps are of first order here.
    """

    sampler: Sampler
    rounds: int

    def times(self, schedule: Schedule, steps: int, *, start: float = 1.0) -> Tensor:
        """The sampler's own grid."""
        return self.sampler.times(schedule, steps, start=start)

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        schedule: Schedule,
        times: Tensor,
        *,
        noise: Noise,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """As the sampler; `on_step` sees the last round's x0_hat of each step."""
        sampler = self.sampler.for_single_step(len(times) - 1)
        for i, (now, then) in enumerate(pairwise(compute_noise_levels(schedule, times))):
            for left in reversed(range(self.rounds)):

                def report(_: int, x0_hat: Tensor, i: int = i, left: int = left) -> None:
                    if on_step is not None and not left:
                        on_step(i, x0_hat)

                step = times[i : i + 2]
                x_s = sampler(denoise, x, schedule, step, noise=noise, on_step=report)
                x = renoise(x_s, then, now, noise(x)) if left else x_s
        return x
