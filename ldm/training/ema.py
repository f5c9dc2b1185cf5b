"""The running average of the denoiser's weights."""

import copy

import torch
from torch import Tensor, nn


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
    def update(self, denoiser: nn.Module, *, step: int, skipped: Tensor | None = None) -> None:
        """Move towards `denoiser`, after optimizer step number `step`, counted from 1.

        skipped: () on the device, 1.0 where that step was left out and the average stays, else 0.0.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, weights = list(self.module.parameters()), list(denoiser.parameters())
        if skipped is None:
            torch._foreach_lerp_(averages, weights, 1 - decay)
        elif skipped.device.type != "cpu":
            lerp_by_tensor(averages, weights, (1 - decay) * (1 - skipped))
        elif skipped == 0:  # which costs nothing to ask there, as waiting for a device would
            torch._foreach_lerp_(averages, weights, 1 - decay)
        for average, value in zip(self.module.buffers(), denoiser.buffers(), strict=True):
            average.copy_(value)

    def train(self, mode: bool = True) -> "EMA":
        """The average is never in training mode."""
        return super().train(False)


def lerp_by_tensor(averages: list[Tensor], weights: list[Tensor], share: Tensor) -> None:
    """Lerp in place by a share () that only the device knows; 0 moves nothing.

    torch has no fused lerp for that. Some tensors at a time: the changes take memory.
    """
    for i in range(0, len(weights), 16):
        change = torch._foreach_sub(weights[i : i + 16], averages[i : i + 16])
        torch._foreach_mul_(change, share)
        torch._foreach_add_(averages[i : i + 16], change)
