"""Power-function averages of weights, and any other such average as a mixture of stored ones.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3
and appendix C. The average at step t weighs the weights of step s by its profile,

    p(s) = (gamma + 1) s^gamma / t^(gamma + 1)    for 0 < s <= t.

Its length (sigma_rel in the paper) is the profile's width as a share of t: 0.10 reaches back over
about a tenth of the run. A mixture of stored profiles that is close to another profile gives
averages that are close as well.

Shapes: n stored averages.
"""

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from ldm.training.ema import TensorPair

MAX_EMA_LENGTH = 12**-0.5  # gamma 0: all steps have the same weight


class EMAProfile(NamedTuple):
    """The weight that an average gives to each step."""

    length: float  # as a share of the run
    step: int  # of the optimizer, from 1


class EMAMixture(NamedTuple):
    """An average as a weighted sum of stored averages."""

    shares: np.ndarray  # (n,), float64; they sum to 1, and some may be negative
    misfit: float  # relative distance of its profile from the target profile; 0 is exact


def length_to_exponent(length: float) -> float:
    """Returns gamma >= 0 of the profile of a length in (0, 0.2887]."""
    if not 0 < length <= MAX_EMA_LENGTH:
        raise ValueError(
            f"an EMA length is the share of the run that it reaches back over, above 0 and at most "
            f"{MAX_EMA_LENGTH:.4f} (all steps alike), not {length}; 0.05 to 0.15 are usual"
        )
    # The largest root of length^2 (gamma + 2)^2 (gamma + 3) = gamma + 1.
    inverse = length**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return max(0.0, float(roots.real.max()))


def profile_inner_products(first: Sequence[EMAProfile], second: Sequence[EMAProfile]) -> np.ndarray:
    """Returns the integrals (len(first), len(second)) of p q over time, for each two profiles."""
    a = np.array([length_to_exponent(profile.length) for profile in first])[:, None]
    b = np.array([length_to_exponent(profile.length) for profile in second])
    s = np.array([profile.step for profile in first], dtype=float)[:, None]
    t = np.array([profile.step for profile in second], dtype=float)
    # (a + 1) (b + 1) / (a + b + 1) min(s, t)^(a + b + 1) / (s^(a + 1) t^(b + 1)), written with
    # ratios below 1, as the powers overflow.
    ratio = np.minimum(s, t) / np.maximum(s, t)
    exponent = np.where(s < t, b, a)  # of the later profile
    return (a + 1) * (b + 1) / (a + b + 1) * ratio**exponent / np.maximum(s, t)


def solve_mixture(profiles: Sequence[EMAProfile], target_profile: EMAProfile) -> EMAMixture:
    """Returns the mixture of profiles that is nearest to the target, in the mean square over time.

    The shares sum to 1, so weights that never change stay as they are.
    """
    if not profiles or len(set(profiles)) < len(profiles):
        raise ValueError(f"it takes different profiles to make another, got {list(profiles)}")
    gram = profile_inner_products(profiles, profiles)
    target = profile_inner_products(profiles, [target_profile])[:, 0]
    own = float(profile_inner_products([target_profile], [target_profile])[0, 0])
    # Profiles are scaled to norm 1 for the solver; the last row is the sum of the shares.
    norm = np.sqrt(np.diagonal(gram))
    n = len(profiles)
    system = np.zeros((n + 1, n + 1))
    system[:n, :n] = gram / norm[:, None] / norm
    system[n, :n] = system[:n, n] = norm.min() / norm
    shares = np.linalg.solve(system, np.append(target / norm, norm.min()))[:n] / norm
    square = 1 - 2 * (shares @ target) / own + shares @ gram @ shares / own
    return EMAMixture(shares, math.sqrt(max(square, 0.0)))


class PowerEMA(nn.Module):
    """Averages of a denoiser's weights with profiles of several lengths, one network each.

    Unlike `EMA` they need no warm-up: the first step's weights are the first average. A skipped
    step counts as one that does not change the weights, so profiles remain powers of the step.
    """

    def __init__(self, denoiser: nn.Module, *, lengths: Sequence[float]) -> None:
        super().__init__()
        self.lengths = [float(length) for length in lengths]
        if len(set(self.lengths)) < len(self.lengths):
            raise ValueError(f"phema.lengths={self.lengths} names a length twice")
        self.exponents = [length_to_exponent(length) for length in self.lengths]
        self.tracks = nn.ModuleList(
            copy.deepcopy(denoiser).eval().requires_grad_(False) for _ in self.lengths
        )
        self.pairs = [TensorPair(track, denoiser) for track in self.tracks]

    @torch.no_grad()
    def update(self, denoiser: nn.Module, *, step: int) -> None:
        """Moves towards `denoiser` after optimizer step `step`, counted from 1."""
        if self.pairs[0].network is not denoiser:
            self.pairs = [TensorPair(track, denoiser) for track in self.tracks]
        for gamma, pair in zip(self.exponents, self.pairs, strict=True):
            share = 1 - (1 - 1 / step) ** (gamma + 1)
            torch._foreach_lerp_(*pair.parameters(), share)
            pair.copy_buffers()

    def train(self, mode: bool = True) -> "PowerEMA":
        """Returns the averages, which are never in training mode."""
        return super().train(False)
