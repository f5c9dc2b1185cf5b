"""The running average of the denoiser's weights."""

import copy

import torch
from torch import nn


class EMA(nn.Module):
    """A second denoiser whose weights are an exponential moving average of the first one's.

    The decay warms up as (1 + step) / (10 + step), so that early weights are soon forgotten
    (TensorFlow's ExponentialMovingAverage). It is a network of its own, not a swap of weights:
    nothing that happens during validation can mix the two up.
    """

    def __init__(self, denoiser: nn.Module, *, decay: float) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"ema.decay={decay} must lie in [0, 1)")
        self.decay = decay
        self.module = copy.deepcopy(denoiser).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, denoiser: nn.Module, *, step: int) -> None:
        """Move towards `denoiser`, after optimizer step number `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, weights = list(self.module.parameters()), list(denoiser.parameters())
        torch._foreach_lerp_(averages, weights, 1 - decay)
        for average, value in zip(self.module.buffers(), denoiser.buffers(), strict=True):
            average.copy_(value)

    def train(self, mode: bool = True) -> "EMA":
        """The average is never in training mode."""
        return super().train(False)
