"""Multistep solvers (DPM-Solver++, UniPC): the data estimate d is the mean of x0_hat over the step.

With lambda = log(alpha / sigma) the update rule solves the ODE exactly if

    d = integral of e^lambda x0_hat(lambda) over the step / integral of e^lambda

(Lu et al. 2022, DPM-Solver++, equation 8). A solver of order k takes x0_hat from the polynomial
through k of its values.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.samplers import base
from ldm.diffusion.samplers.base import NoiseLevel, Sampler, StepIterator, Trajectory

SOLVER_ORDERS = (1, 2, 3)  # polynomials of higher order oscillate


class Point(NamedTuple):
    """The x0_hat (B, C, h, w) at a noise level."""

    level: NoiseLevel
    x0_hat: Tensor


@dataclass(frozen=True, kw_only=True)
class DPMSolverSampler(Sampler):
    """DPM-Solver++ (multistep) of order 1 to 3; order 2 is their algorithm 2, known as 2M.

    `eta` goes from the ODE (0) to the SDE (1, SDE-DPM-Solver++, Lu et al. 2022, section 5), as in
    DDIM, which is order 1. Order 3 has the exact mean and converges at third order: the published
    code, k-diffusion and diffusers take half of its last term and converge at second order.
    """

    order: int = 2
    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_solver_order(self.order)
        base.check_eta(self.eta)

    def iterate(self, x: Tensor, path: Trajectory) -> StepIterator:
        return iterate_multistep(x, path, self.order, eta=self.eta)


@dataclass(frozen=True, kw_only=True)
class UniPCSampler(Sampler):
    """UniPC with B2(h), multistep, of order 1 to 3 (Zhao et al. 2023, algorithms 1 and 2).

    The x0_hat at the end of a step corrects that step, for one order more without another call.
    """

    order: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_solver_order(self.order)

    def iterate(self, x: Tensor, path: Trajectory) -> StepIterator:
        return iterate_multistep(x, path, self.order, correct=True)


def check_solver_order(order: int) -> None:
    """ValueError for another order."""
    if order not in SOLVER_ORDERS:
        raise ValueError(f"order {order} is none of {', '.join(map(str, SOLVER_ORDERS))}")


def iterate_multistep(
    x: Tensor, path: Trajectory, order: int, *, eta: float = 0.0, correct: bool = False
) -> StepIterator:
    """The steps from `x`; correct: UniPC's corrector, which takes the last step again."""
    points, before = [], x
    steps = len(path.noise_levels) - 1
    for i, (now, then) in enumerate(pairwise(path.noise_levels)):
        here = Point(now, path.x0_hat(x, i))
        if correct and points:
            last = points[-1].level
            x = base.take_step(before, average_x0_hat([*points, here], last, now), last, now)
        # Limited by the past, and lower at the end (Zhao et al. 2023).
        points = [*points, here][-min(order, i + 1, steps - i) :]
        before, up = x, eta * base.posterior_std(now, then)
        d = average_x0_hat(points, now, then, up=up)
        x = base.take_step(x, d, now, then, up=up, noise=path.noise)
        yield x, here.x0_hat


def average_x0_hat(
    points: Sequence[Point], now: NoiseLevel, then: NoiseLevel, *, up: float = 0.0
) -> Tensor:
    """The mean x0_hat (B, C, h, w) over the step from `now` to `then`.

    points: from old to new, one of them at `now`; the last may be at `then`. up: fresh noise.
    """
    if len(points) == 1:
        return points[0].x0_hat
    located = [(locate_in_step(point.level, now, then), point.x0_hat) for point in points]
    located = [each for each in located if math.isfinite(each[0])]  # not from pure noise
    weights = quadrature_weights([location for location, _ in located], now, then, up=up)
    return sum(weight * x0_hat for weight, (_, x0_hat) in zip(weights, located, strict=True))


def locate_in_step(level: NoiseLevel, now: NoiseLevel, then: NoiseLevel) -> float:
    """The place of a level in lambda, with `now` at 0 and `then` at 1."""
    if level in (now, then):
        return float(level == then)
    return (half_log_snr(level) - half_log_snr(now)) / (half_log_snr(then) - half_log_snr(now))


def half_log_snr(level: NoiseLevel) -> float:
    """lambda = log(alpha / sigma), infinite without signal or without noise."""
    alpha, sigma = level
    if alpha <= 0 or sigma <= 0:
        return math.copysign(math.inf, alpha - sigma)
    return math.log(alpha / sigma)


def quadrature_weights(
    locations: Sequence[float], now: NoiseLevel, then: NoiseLevel, *, up: float = 0.0
) -> list[float]:
    """The weights of the values at `locations` in the mean over the step from 0 to 1.

    Two values give a line, evaluated in the middle of the step, as in 2M and B2(h); three give a
    polynomial, whose mean is exact.
    """
    n = len(locations)
    if n <= 2:
        moments = [1.0, 0.5][:n]
    else:
        # e^-decay is the factor of x_t / alpha_t in x_s / alpha_s.
        decay = -math.log(base.sigma_ratio(now, then, up=up) * now[0] / then[0])
        moments = [1.0]  # of u^k over [0, 1], weighted by e^(decay u), by parts
        for k in range(1, n):
            moments.append(-1 / math.expm1(-decay) - k / decay * moments[-1])
    powers = torch.tensor(locations, dtype=torch.float64) ** torch.arange(n)[:, None]
    return torch.linalg.solve(powers, torch.tensor(moments, dtype=torch.float64)).tolist()
