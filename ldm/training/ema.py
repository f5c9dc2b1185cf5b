"""The exponential moving average of the denoiser's weights."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class EMA(nn.Module):
    """A second network, `module`, whose weights are a moving average of the denoiser's.

    The decay warms up as (1 + step) / (10 + step), as in TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, denoiser: nn.Module, *, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.module = copy_for_average(denoiser)
        self.pair = TensorPair(self.module, denoiser)

    @torch.no_grad()
    def update(self, denoiser: nn.Module, *, step: int, skipped: Tensor | None = None) -> None:
        """Moves towards `denoiser` after optimizer step `step`, counted from 1.

        skipped: (), 1.0 if the step was skipped and the average stays, else 0.0.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        if self.pair.network is not denoiser:
            self.pair = TensorPair(self.module, denoiser)
        averages, weights = self.pair.parameters()
        if skipped is not None and skipped.device.type != "cpu":  # reading it would wait
            lerp_by_tensor(averages, weights, (1 - decay) * (1 - skipped))
        elif skipped is None or skipped == 0:
            torch._foreach_lerp_(averages, weights, 1 - decay)
        self.pair.copy_buffers()

    def train(self, mode: bool = True) -> "EMA":
        """Returns the average, which is never in training mode."""
        return super().train(False)


def copy_for_average(network: nn.Module) -> nn.Module:
    """Returns a copy of a network, whose frozen parameters are those of the network itself."""
    frozen = {id(weight): weight for weight in network.parameters() if not weight.requires_grad}
    return copy.deepcopy(network, frozen).eval().requires_grad_(False)


class TensorPair:
    """The tensors of an average and of its network, without a walk over their modules each step.

    A parameter may be replaced by another, as in a sharded network, but not a submodule.
    """

    def __init__(self, average: nn.Module, network: nn.Module) -> None:
        self.network = network
        nets = [list(net.modules()) for net in (average, network)]
        self._parameters = [[part._parameters for part in net if part._parameters] for net in nets]
        self._buffers = [[part._buffers for part in net if part._buffers] for net in nets]

    def parameters(self) -> list[list[Tensor]]:
        """Returns the parameters of both, in the same order, without those that both share."""
        pairs = zip(*map(list_tensors, self._parameters), strict=True)
        own = [(average, weight) for average, weight in pairs if average is not weight]
        return [[pair[0] for pair in own], [pair[1] for pair in own]]

    def copy_buffers(self) -> None:
        """Copies the network's buffers into those of the average."""
        for average, value in zip(*map(list_tensors, self._buffers), strict=True):
            average.copy_(value)


def list_tensors(places: list[Mapping[str, Tensor | None]]) -> list[Tensor]:
    """Returns the tensors of modules' dictionaries; one that several modules share comes once."""
    return list({id(t): t for place in places for t in place.values() if t is not None}.values())


def lerp_by_tensor(averages: list[Tensor], weights: list[Tensor], share: Tensor) -> None:
    """Lerps in place by a share () on the device, 16 tensors at a time to save memory."""
    for i in range(0, len(weights), 16):
        change = torch._foreach_sub(weights[i : i + 16], averages[i : i + 16])
        torch._foreach_mul_(change, share)
        torch._foreach_add_(averages[i : i + 16], change)
