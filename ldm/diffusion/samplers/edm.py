"""EDM's samplers: Euler and Heun, with churn (Karras et al. 2022, algorithms 1 and 2).

Their noise level is r = sigma / alpha, so that all of it holds on any schedule.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.samplers.base import (
    NoiseLevel,
    Sampler,
    StepIterator,
    Trajectory,
    compute_noise_levels,
    take_step,
)
from ldm.diffusion.samplers.spacing import find_timesteps_at_ratio

# Heun's rule takes the mean of the slopes at a step's two ends: of what slope, against what.
SLOPES = {
    "flow": lambda alpha, sigma: sigma / (alpha + sigma),  # any schedule seen as rectified flow
    "edm": lambda alpha, sigma: sigma / alpha if alpha > 0 else math.inf,  # EDM's, of x / alpha
    "x0": lambda alpha, sigma: 1.0,  # not of x but of x0_hat: d is its plain mean
}


@dataclass(frozen=True, kw_only=True)
class EDMSampler(Sampler):
    """Order 1 is Euler: d = x0_hat. Order 2 is Heun, which asks at the end of a step as well.

    There d = x0_hat + w (x0_hat at the end - x0_hat) with w = c_t / 2 c_s, where c belongs to
    `slope`: sigma / (alpha + sigma) for `flow`, which is Heun's method of rectified flow on any
    schedule; sigma / alpha for `edm` (Karras et al. 2022, algorithm 1), poor where a step leaves
    almost pure noise; 1 for `x0`. A step of order 2 costs two calls, but the last, which is
    Euler's. `churn`: that much noise is added in all, before the steps whose r lies in [churn_min,
    churn_max] and scaled by `churn_noise` (their algorithm 2: S_churn, S_tmin, S_tmax, S_noise; r
    is twice their sigma, whose data has half our deviation). The network is asked at the raised
    level, which goes as far as the schedule does. 0 is the ODE.
    Raises ValueError for an order, slope or churn that there is not.
    """

    order: int = 2
    slope: str = "flow"
    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float | None = None
    churn_noise: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in (1, 2):
            raise ValueError(f"order {self.order} is none of 1 (Euler), 2 (Heun)")
        if self.slope not in SLOPES:
            raise ValueError(f"slope '{self.slope}' is none of {', '.join(SLOPES)}")
        if self.churn < 0 or self.churn_noise < 0:
            raise ValueError("churn and churn_noise must be 0 or more")

    def for_single_step(self, steps: int) -> Sampler:
        """As it is, with a step's part of the churn."""
        return replace(self, churn=self.churn / steps)

    def walk(self, x: Tensor, path: Trajectory) -> StepIterator:
        times, starts = self.apply_churn(path)
        for i, (before, then) in enumerate(pairwise(path.noise_levels)):
            now = starts[i]
            if now != before:
                x = renoise(x, before, now, self.churn_noise * path.noise(x))
            x0_hat = path.estimate(x, times[i])
            x_s = take_step(x, x0_hat, now, then)
            if self.order == 2 and then[1] > 0:
                at_end = path.x0_hat(x_s, i + 1)
                x_s = take_step(x, torch.lerp(x0_hat, at_end, self.weight(now, then)), now, then)
            x = x_s
            yield x, x0_hat

    def weight(self, now: NoiseLevel, then: NoiseLevel) -> float:
        """How far d goes from x0_hat at the beginning of a step to x0_hat at its end."""
        coordinate = SLOPES[self.slope]
        w = coordinate(*now) / coordinate(*then) / 2
        return w if math.isfinite(w) else 0.0  # EDM's r has no slope at pure noise: Euler

    def apply_churn(self, path: Trajectory) -> tuple[Tensor, list[NoiseLevel]]:
        """Where each step begins once churn has added its noise: times, and their levels."""
        if self.churn == 0:
            return path.times, path.noise_levels
        # All at once and beforehand: no step has to wait for the device.
        now = torch.tensor(path.noise_levels[:-1], dtype=torch.float64)  # (steps, 2)
        r = now[:, 1] / now[:, 0]
        gamma = min(self.churn / len(r), math.sqrt(2) - 1)
        most = math.inf if self.churn_max is None else self.churn_max
        churned = r.isfinite() & (r >= self.churn_min) & (r <= most)
        up = find_timesteps_at_ratio(path.schedule, r * (1 + gamma))
        starts = zip(
            churned.tolist(),
            compute_noise_levels(path.schedule, up),
            path.noise_levels,
            strict=False,
        )
        times = torch.where(churned, up.to(path.times), path.times[:-1])
        return times, [high if yes else low for yes, high, low in starts]


def renoise(x: Tensor, before: NoiseLevel, now: NoiseLevel, z: Tensor) -> Tensor:
    """x at a level brought to a noisier one with the noise `z`."""
    keep = now[0] / before[0]
    return keep * x + math.sqrt(max(now[1] ** 2 - (keep * before[1]) ** 2, 0.0)) * z
