"""EDM's samplers: Euler and Heun, with churn (Karras et al. 2022, algorithms 1 and 2)."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.samplers import base
from ldm.diffusion.samplers.base import NoiseLevel, Sampler, StepIterator, Trajectory

# Heun's method takes the mean of the slopes at both ends of a step: the variable of the slope.
SLOPES = {
    "flow": lambda alpha, sigma: sigma / (alpha + sigma),  # any schedule seen as rectified flow
    # EDM's, of x / alpha; poor if a step ends near pure noise.
    "edm": lambda alpha, sigma: sigma / alpha if alpha > 0 else math.inf,
    "x0": lambda alpha, sigma: 1.0,  # x0_hat itself: d is its mean
}


@dataclass(frozen=True, kw_only=True)
class EDMSampler(Sampler):
    """Order 1 is Euler, d = x0_hat. Order 2 is Heun, with a second call at the end of each step.

    There d = x0_hat + w (x0_hat at the end - x0_hat) with w = c_t / 2 c_s, where `slope` says c:
    see SLOPES. The last step is always Euler's.
    churn: that much noise is added in total, before the steps with r = sigma / alpha in
    [churn_min, churn_max], scaled by `churn_noise` (their algorithm 2: S_churn, S_tmin, S_tmax,
    S_noise; r is twice their sigma, as their data has half our deviation). 0 is the ODE.
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
        return replace(self, churn=self.churn / steps)

    def iterate(self, x: Tensor, path: Trajectory) -> StepIterator:
        timesteps, starts = self.apply_churn(path)
        for i, (before, then) in enumerate(pairwise(path.noise_levels)):
            now = starts[i]
            if now != before:
                x = renoise(x, before, now, self.churn_noise * path.noise(x))
            x0_hat = path.estimate(x, timesteps[i])
            x_s = base.take_step(x, x0_hat, now, then)
            if self.order == 2 and then[1] > 0:
                d = torch.lerp(x0_hat, path.x0_hat(x_s, i + 1), self.weight(now, then))
                x_s = base.take_step(x, d, now, then)
            x = x_s
            yield x, x0_hat

    def weight(self, now: NoiseLevel, then: NoiseLevel) -> float:
        """The weight w in d of the x0_hat at the end of a step."""
        c = SLOPES[self.slope]
        w = c(*now) / c(*then) / 2
        return w if math.isfinite(w) else 0.0  # EDM's r has no slope at pure noise: Euler

    def apply_churn(self, path: Trajectory) -> tuple[Tensor, list[NoiseLevel]]:
        """The times and noise levels at which the steps start after churn."""
        if self.churn == 0:
            return path.timesteps, path.noise_levels
        now = torch.tensor(path.noise_levels[:-1], dtype=torch.float64)  # (steps, 2)
        r = now[:, 1] / now[:, 0]
        gamma = min(self.churn / len(r), math.sqrt(2) - 1)
        churn_max = math.inf if self.churn_max is None else self.churn_max
        churned = r.isfinite() & (r >= self.churn_min) & (r <= churn_max)
        raised = path.schedule.timesteps_at_ratio(r * (1 + gamma))
        timesteps = torch.where(churned, raised.to(path.timesteps), path.timesteps[:-1])
        levels = base.compute_noise_levels(path.schedule, raised)
        pairs = zip(churned.tolist(), levels, path.noise_levels[:-1], strict=True)
        return timesteps, [high if yes else low for yes, high, low in pairs]


def renoise(x: Tensor, before: NoiseLevel, now: NoiseLevel, z: Tensor) -> Tensor:
    """x brought from a noise level to a noisier one with the noise `z`."""
    ratio = now[0] / before[0]
    return ratio * x + math.sqrt(max(now[1] ** 2 - (ratio * before[1]) ** 2, 0.0)) * z
