"""The optimizer and its learning-rate schedule."""

import math
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn

from ldm.training.lightning_adapter import allow_gradient_clipping


@dataclass(frozen=True)
class NetworkParameters:
    """The parameters of a network, for optimizers that need to know whose they are."""

    network: nn.Module

    def __iter__(self) -> Iterator[nn.Parameter]:
        return self.network.parameters()


@dataclass(kw_only=True)
class AdamW:
    """AdamW with linear warm-up, then a constant or a cosine-shaped learning rate.

    Biases and gains (one dimension) have no weight decay.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup: int = 100
    decay: str = "constant"

    def __post_init__(self) -> None:
        if self.decay not in ("constant", "cosine"):
            raise ValueError(f"optimizer.decay='{self.decay}' is neither constant nor cosine")

    def __call__(self, parameters: Iterable[nn.Parameter], *, steps: int) -> dict:
        """Returns what `configure_optimizers` needs for `steps` steps (-1: no end)."""
        optimizer = self.make_optimizer(self.make_groups(parameters))
        settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        settings = deepcopy(settings)  # a learning rate may be a tensor, which the schedule fills

        def adapt(optimizer: torch.optim.Optimizer) -> None:
            for group, own in zip(optimizer.param_groups, deepcopy(settings), strict=True):
                group.update(own, initial_lr=deepcopy(own["lr"]))

        optimizer.register_load_state_dict_post_hook(adapt)
        curve = ConfiguredLambdaLR(optimizer, lambda step: self.factor(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": curve, "interval": "step"}}

    def make_groups(self, parameters: Iterable[nn.Parameter]) -> list[dict]:
        """Returns the parameter groups of what is trained."""
        return group_by_decay([p for p in parameters if p.requires_grad], self.weight_decay)

    def make_optimizer(self, groups: list[dict]) -> torch.optim.Optimizer:
        """Returns the optimizer of these parameter groups."""
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=tuple(self.betas), fused=True)
        allow_gradient_clipping(optimizer)
        optimizer.register_load_state_dict_post_hook(match_memory_layout)
        return optimizer

    def factor(self, step: int, steps: int) -> float:
        """Returns the share of `lr` at a step counted from 0."""
        warm = min(1.0, (step + 1) / max(self.warmup, 1))
        if self.decay == "constant" or steps <= 0:
            return warm
        progress = min(1.0, max(0, step - self.warmup) / max(1, steps - self.warmup))
        return warm * (0.5 + 0.5 * math.cos(math.pi * progress))


def group_by_decay(weights: Sequence[nn.Parameter], weight_decay: float) -> list[dict]:
    """Parameter groups of what is decayed and of biases and gains; those without any left out."""
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class ConfiguredLambdaLR(torch.optim.lr_scheduler.LambdaLR):
    """A schedule that takes only the step from a state dict, and learning rates from its own."""

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict({**state_dict, "base_lrs": self.base_lrs})
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = lr


def match_memory_layout(optimizer: torch.optim.Optimizer) -> None:
    """Gives loaded moments the memory layout of their weights.

    The fused AdamW ignores strides: moments of another layout would go to other weights, without
    an error (torch 2.13).
    """
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == weight.shape and value.stride() != weight.stride():
                state[name] = torch.empty_like(weight).copy_(value)
