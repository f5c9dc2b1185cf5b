"""Weightings: how much each noise level counts in the loss.

A weight w(SNR) is that of the squared error of x0_hat. The squared error of the network's output is
`Prediction.gain` times that, hence w / gain, for every prediction and schedule.
"""

import math
from collections.abc import Callable

from torch import Tensor

Weighting = Callable[[Tensor, Tensor], Tensor]  # SNR (B,), gain (B,) -> factor (B,)


class UniformWeighting:
    """1 for the squared error of the network's output (Ho et al. 2020, equation 14)."""

    def __call__(self, snr: Tensor, gain: Tensor) -> Tensor:
        return snr.new_ones(snr.shape)


class MinSNRWeighting:
    """w = min(SNR, gamma) (Hang et al. 2023, arXiv:2303.09556).

    min(1, gamma / SNR) for eps, min(SNR, gamma) / (SNR + 1) for v on a variance-preserving schedule
    (not min(SNR + 1, gamma) / (SNR + 1): diffusers' issue 5654).
    """

    def __init__(self, gamma: float = 5.0) -> None:
        self.gamma = require_positive("gamma", gamma)

    def __call__(self, snr: Tensor, gain: Tensor) -> Tensor:
        return snr.clamp(max=self.gamma) / gain


class SoftMinSNRWeighting:
    """w = 1 / (1 / SNR + 1 / gamma) (Crowson et al. 2024, HDiT, arXiv:2401.11605)."""

    def __init__(self, gamma: float = 5.0) -> None:
        self.gamma = require_positive("gamma", gamma)

    def __call__(self, snr: Tensor, gain: Tensor) -> Tensor:
        return 1 / (1 / snr + 1 / self.gamma) / gain


class P2Weighting:
    """w = SNR / (k + SNR)^gamma, for eps 1 / (k + SNR)^gamma (Choi et al. 2022, 2204.00227)."""

    def __init__(self, gamma: float = 1.0, k: float = 1.0) -> None:
        if not 0 <= gamma < math.inf:
            raise ValueError(f"weighting.gamma must be 0 or more, got {gamma}")
        self.gamma, self.k = gamma, require_positive("k", k)

    def __call__(self, snr: Tensor, gain: Tensor) -> Tensor:
        return snr / (self.k + snr) ** self.gamma / gain


class EDMWeighting:
    """w = SNR + 1 / sigma_data^2 (Karras et al. 2022, arXiv:2206.00364, table 1: lambda).

    Their sigma is sigma / alpha here.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        self.sigma_data = require_positive("sigma_data", sigma_data)

    def __call__(self, snr: Tensor, gain: Tensor) -> Tensor:
        return (snr + self.sigma_data**-2) / gain


class DebiasedWeighting:
    """w = sqrt(SNR): 1 / sqrt(SNR) for eps (Yu et al. 2023, arXiv:2310.08442)."""

    def __call__(self, snr: Tensor, gain: Tensor) -> Tensor:
        return snr.sqrt() / gain


def require_positive(name: str, value: float) -> float:
    """`value`; ValueError unless it is a finite number above 0."""
    if not 0 < value < math.inf:
        raise ValueError(f"weighting.{name} must be above 0, got {value}")
    return value
