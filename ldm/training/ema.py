"""The exponential moving average of the denoiser's weights."""

import copy

import torch
from torch import Tensor, nn


class EMA(nn.Module):
    """A second network, `module`, whose weights are a moving average of the denoiser's.

    The decay warms up as (1 + step) / (10 + step), as in TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, denoiser: nn.Module, *, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.module = copy.deepcopy(denoiser).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, denoiser: nn.Module, *, step: int, skipped: Tensor | None = None) -> None:
        """Moves towards `denoiser` after optimizer step `step`, counted from 1.

        skipped: (), 1.0 if the step was skipped and the average stays, else 0.0.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, weights = list(self.module.parameters()), list(denoiser.parameters())
        if skipped is not None and skipped.device.type != "cpu":  # reading it would wait
            lerp_by_tensor(averages, weights, (1 - decay) * (1 - skipped))
        elif skipped is None or skipped == 0:
            torch._foreach_lerp_(averages, weights, 1 - decay)
        for average, value in zip(self.module.buffers(), denoiser.buffers(), strict=True):
            average.copy_(value)

    def train(self, mode: bool = True) -> "EMA":
        """Returns the average, which is never in training mode."""
        return super().train(False)


def lerp_by_tensor(averages: list[Tensor], weights: list[Tensor], share: Tensor) -> None:
    """Lerps in place by a share () on the device, 16 tensors at a time to save memory."""
    for i in range(0, len(weights), 16):
        change = torch._foreach_sub(weights[i : i + 16], averages[i : i + 16])
        torch._foreach_mul_(change, share)
        torch._foreach_add_(averages[i : i + 16], change)
