"""First-order samplers, with d = x0_hat: DDIM, DDPM, and consistency sampling (LCM)."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.samplers import base
from ldm.diffusion.samplers.base import NoiseLevel, Sampler, StepIterator, Trajectory
from ldm.diffusion.schedules import Schedule

DATA_VARIANCE = 0.25  # of LCM's boundary condition


@dataclass(frozen=True, kw_only=True)
class DDIMSampler(Sampler):
    """`eta` goes from the ODE (0, DDIM) to the posterior's own noise (1, DDPM).

    eta = 1 is ancestral sampling (Ho et al. 2020, algorithm 2, with the smaller of their two
    variances). eta = 0 is Euler's method in sigma / alpha, and in t on the flow schedule.
    """

    steps_alike = True
    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        base.check_eta(self.eta)

    def iterate(self, x: Tensor, path: Trajectory) -> StepIterator:
        def fresh_noise(now: NoiseLevel, then: NoiseLevel) -> float:
            return self.eta * base.posterior_std(now, then)

        return iterate_first_order(x, path, fresh_noise, pairs=self.pair_levels(path))


@dataclass(frozen=True, kw_only=True)
class ConsistencySampler(Sampler):
    """Multistep consistency sampling, for networks distilled to a few steps: all noise is fresh.

    Song et al. 2023, arXiv:2303.01469, algorithm 1; Luo et al. 2023, LCM, algorithm 3.
    original_steps: the number of even timesteps of the distillation, from which the timesteps are
    taken; None for any timestep. timestep_scaling: 10 in diffusers' LCMScheduler, where x0_hat goes
    over to x as the timestep goes to 0 (their c_skip and c_out, with a data deviation of 0.5).
    """

    original_steps: int | None = 50
    timestep_scaling: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.original_steps is not None and self.original_steps < 1:
            raise ValueError(
                f"original_steps must be 1 or more, or null for any time, not {self.original_steps}"
            )
        if self.timestep_scaling is not None and self.timestep_scaling <= 0:
            raise ValueError(
                f"timestep_scaling must be above 0, or null for none, not {self.timestep_scaling}"
            )
        if not self.set_alpha_to_one:
            raise ValueError("sampler=lcm ends at the data: sampler.set_alpha_to_one=true")

    def timesteps(self, schedule: Schedule, steps: int, *, start: float = 1.0) -> Tensor:
        times = super().timesteps(schedule, steps, start=start)
        if self.original_steps is None:
            return times
        available = math.floor(start * self.original_steps + 1e-6)  # original times up to `start`
        if self.spacing != "trailing" or steps > available:
            raise ValueError(
                f"{steps} {self.spacing} steps from t = {start} for a network that was distilled "
                f"at {self.original_steps} even times: take fewer steps, sampler.spacing=trailing, "
                "or sampler.original_steps=null where it knows all times"
            )
        skipped = (torch.arange(1, steps) * available).div(steps).floor()
        times[1:-1] = (available - skipped) / self.original_steps
        return times

    def iterate(self, x: Tensor, path: Trajectory) -> StepIterator:
        if self.timestep_scaling is None:
            return iterate_first_order(x, path, lambda now, then: then[1])
        k = self.timestep_scaling * path.schedule.timestep(path.timesteps[:-1])
        skips = (DATA_VARIANCE / (k.square() + DATA_VARIANCE)).tolist()

        def bound(x: Tensor, x0_hat: Tensor, i: int) -> Tensor:
            return math.sqrt(1 - skips[i]) * x0_hat + skips[i] * x

        return iterate_first_order(x, path, lambda now, then: then[1], bound=bound)


def iterate_first_order(
    x: Tensor,
    path: Trajectory,
    fresh_noise: Callable[[NoiseLevel, NoiseLevel], float],
    *,
    bound: Callable[[Tensor, Tensor, int], Tensor] | None = None,
    pairs: Iterable[tuple[NoiseLevel, NoiseLevel]] | None = None,
) -> StepIterator:
    """The steps from `x` with d = x0_hat and that much fresh noise; bound: x, x0_hat, i -> d."""
    for i, (now, then) in enumerate(pairs or pairwise(path.noise_levels)):
        x0_hat = path.x0_hat(x, i)
        if bound is not None:
            x0_hat = bound(x, x0_hat, i)
        x = base.take_step(x, x0_hat, now, then, up=fresh_noise(now, then), noise=path.noise)
        yield x, x0_hat
