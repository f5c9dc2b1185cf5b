"""Averages of weights by a power of time, and any other such average out of those that were kept.

After Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models",
section 3 and appendix C. The average at step t weighs the weights of step s by its profile,

    p(s) = (gamma + 1) s^gamma / t^(gamma + 1)    for 0 < s <= t,

whose width, as a share of t, is called its length here (sigma_rel in the paper): 0.10 reaches back
over about a tenth of the run, however long the run is. Profiles are functions, so one that nobody
kept is the combination of those kept that comes nearest to it, and what holds for the profiles
holds for the averages.

Shapes: n averages that are kept.
"""

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

MAX_EMA_LENGTH = (
    12**-0.5
)  # of a profile that weighs all steps alike, gamma 0; below that the first count


class EMAProfile(NamedTuple):
    """What an average weighs: how far it reaches back, as a share of the run, and from where."""

    length: float
    step: int  # of the optimizer, from 1


class EMAMixture(NamedTuple):
    """An average as a sum of others."""

    shares: np.ndarray  # (n,) of each, float64; they add up to 1, and some may be negative
    misfit: float  # relative distance of its profile from the one asked for; 0 is exact


def length_to_exponent(length: float) -> float:
    """gamma >= 0 of the profile of this length; ValueError outside (0, 0.2887]."""
    if not 0 < length <= MAX_EMA_LENGTH:
        raise ValueError(
            f"an EMA length is the share of the run that it reaches back over, above 0 and at most "
            f"{MAX_EMA_LENGTH:.4f} (all steps alike), not {length}; 0.05 to 0.15 are usual"
        )
    # length^2 (gamma + 2)^2 (gamma + 3) = gamma + 1; of its roots the largest is the profile's.
    inverse = length**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return max(0.0, float(roots.real.max()))


def exponent_to_length(gamma: float) -> float:
    """The standard deviation of the profile of this exponent, as a share of the run."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def power_ema_decay(step: int, gamma: float) -> float:
    """How much of the average of the step before remains in that of `step`, counted from 1."""
    return (1 - 1 / step) ** (gamma + 1)


def profile_inner_products(first: Sequence[EMAProfile], second: Sequence[EMAProfile]) -> np.ndarray:
    """Inner products (len(first), len(second)) of profiles: the integral of p q over time."""
    a, b = (
        np.array([length_to_exponent(each.length) for each in side]) for side in (first, second)
    )
    s, t = (np.array([each.step for each in side], dtype=float) for side in (first, second))
    a, s = a[:, None], s[:, None]
    # Of powers: (a + 1) (b + 1) / (a + b + 1) min(s, t)^(a + b + 1) / (s^(a + 1) t^(b + 1)),
    # which is written with ratios below 1 alone, as the powers overflow.
    ratio = np.minimum(s, t) / np.maximum(s, t)
    outlives = np.where(s < t, b, a)  # the exponent of the profile that goes on
    return (a + 1) * (b + 1) / (a + b + 1) * ratio**outlives / np.maximum(s, t)


def solve_mixture(profiles: Sequence[EMAProfile], target_profile: EMAProfile) -> EMAMixture:
    """The sum of kept profiles that is nearest to the wanted one, in the mean square over time.

    The shares are held to add up to 1, so that weights that never change stay as they are.
    Raises ValueError where nothing is kept, or a profile is kept twice.
    """
    if not profiles or len(set(profiles)) < len(profiles):
        raise ValueError(f"it takes different profiles to make another, got {list(profiles)}")
    gram, target = (
        profile_inner_products(profiles, profiles),
        profile_inner_products(profiles, [target_profile])[:, 0],
    )
    own = float(profile_inner_products([target_profile], [target_profile])[0, 0])
    # Each profile at norm 1, for the sake of the solver; the last row is the sum of the shares.
    norm = np.sqrt(np.diagonal(gram))
    n = len(profiles)
    system = np.zeros((n + 1, n + 1))
    system[:n, :n] = gram / norm[:, None] / norm
    system[n, :n] = system[:n, n] = norm.min() / norm
    found = np.linalg.solve(system, np.append(target / norm, norm.min()))[:n] / norm
    square = 1 - 2 * (found @ target) / own + found @ gram @ found / own
    return EMAMixture(found, math.sqrt(max(square, 0.0)))


class PowerEMA(nn.Module):
    """Averages of a denoiser's weights with profiles of several lengths, one network for each.

    Unlike `EMA` they need no warm-up: the first step's weights are the first average. A step whose
    update is left out counts as one that ends with the weights of before, so that the profiles
    remain powers of the step.
    Raises ValueError for a length that is no number, out of range or given twice.
    """

    def __init__(self, denoiser: nn.Module, *, lengths: Sequence[float]) -> None:
        super().__init__()
        try:
            self.lengths = [float(each) for each in lengths]
        except (TypeError, ValueError):
            raise ValueError(
                f"phema.lengths={lengths} is no list of numbers: give phema.lengths=[0.05,0.10]"
            ) from None
        if len(set(self.lengths)) < len(self.lengths):
            raise ValueError(f"phema.lengths={self.lengths} names a length twice")
        self.exponents = [length_to_exponent(each) for each in self.lengths]
        self.tracks = nn.ModuleList(
            copy.deepcopy(denoiser).eval().requires_grad_(False) for _ in self.lengths
        )

    @torch.no_grad()
    def update(self, denoiser: nn.Module, *, step: int) -> None:
        """Move towards `denoiser`, after optimizer step number `step`, counted from 1."""
        weights = list(denoiser.parameters())
        for gamma, track in zip(self.exponents, self.tracks, strict=True):
            torch._foreach_lerp_(
                list(track.parameters()), weights, 1 - power_ema_decay(step, gamma)
            )
            for average, value in zip(track.buffers(), denoiser.buffers(), strict=True):
                average.copy_(value)

    def train(self, mode: bool = True) -> "PowerEMA":
        """The averages are never in training mode."""
        return super().train(False)
