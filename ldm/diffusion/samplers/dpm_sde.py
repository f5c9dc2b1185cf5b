"""DPM++ SDE: two calls a step, the second in the middle of the step."""

import math
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ldm.diffusion.samplers import base
from ldm.diffusion.samplers.base import Sampler, StepIterator, Trajectory


@dataclass(frozen=True, kw_only=True)
class DPMSolverSDESampler(Sampler):
    """DPM-Solver++ SDE of second order in single steps, k-diffusion's `dpmpp_sde`.

    The second x0_hat is at the geometric mean of the r of both ends. `eta` goes from the ODE (0,
    DPM-Solver++(2S)) to the SDE (1). The noises of half a step and of the step belong to one path,
    as in diffusers' DPMSolverSDEScheduler, but are drawn by seed and position: a seed's image
    differs from theirs, its distribution does not.
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_eta(self.eta)

    def iterate(self, x: Tensor, path: Trajectory) -> StepIterator:
        middle_times = find_middle_times(path)
        middle_levels = base.compute_noise_levels(path.schedule, middle_times)
        for i, (now, then) in enumerate(pairwise(path.noise_levels)):
            x0_hat = d = path.x0_hat(x, i)
            up = self.eta * base.posterior_std(now, then)
            noise = path.noise
            if now[0] > 0 and then[1] > 0 and now != then:
                middle, first = middle_levels[i], None
                if up > 0:
                    first, second = path.noise(x), path.noise(x)
                    r_now, r, r_then = (sigma / alpha for alpha, sigma in (now, middle, then))
                    share = (r_now - r) / (r_now - r_then)  # of the whole step's variance
                    whole = math.sqrt(share) * first + math.sqrt(1 - share) * second
                    noise = lambda _, z=whole: z  # noqa: E731
                up_to_middle = self.eta * base.posterior_std(now, middle)
                x_s = base.take_step(
                    x, x0_hat, now, middle, up=up_to_middle, noise=lambda _, z=first: z
                )
                d = path.estimate(x_s, middle_times[i])
            x = base.take_step(x, d, now, then, up=up, noise=noise)
            yield x, x0_hat


def find_middle_times(path: Trajectory) -> Tensor:
    """The times (steps,) with the geometric mean of the r of each step's ends."""
    r = path.schedule.noise_to_signal_ratio(path.timesteps)
    return path.schedule.timesteps_at_ratio((r[:-1] * r[1:]).sqrt())
