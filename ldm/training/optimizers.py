"""The optimizer and its learning-rate curve."""

import math
from collections.abc import Iterable

import torch
from torch import nn


class AdamW:
    """AdamW with linear warm-up, then a constant or a cosine-shaped learning rate.

    Called with parameters and the number of steps, it returns what Lightning's
    `configure_optimizers` wants. Biases and gains (one dimension) are not decayed.
    Raises ValueError for an unknown `decay` and for numbers that are not finite.
    """

    def __init__(
        self,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.01,
        warmup: int = 100,
        decay: str = "constant",
    ) -> None:
        if decay not in ("constant", "cosine"):
            raise ValueError(f"optimizer.decay='{decay}' is neither constant nor cosine")
        numbers = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "warmup": warmup}
        for name, value in numbers.items():
            if not all(map(math.isfinite, value if name == "betas" else [value])):
                raise ValueError(f"optimizer.{name}={value} is not finite")
        self.lr = lr
        self.betas = tuple(betas)
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.decay = decay

    def __call__(self, parameters: Iterable[nn.Parameter], *, steps: int) -> dict:
        """Optimizer and per-step schedule over `steps` steps (-1: no end)."""
        trained = [p for p in parameters if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, fused=True)
        # Lightning refuses to clip gradients of an optimizer that could unscale them by itself.
        optimizer._step_supports_amp_scaling = False
        settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]

        def adapt(optimizer: torch.optim.Optimizer) -> None:
            match_memory_layout(optimizer)
            for group, own in zip(optimizer.param_groups, settings, strict=True):
                group.update(own, initial_lr=own["lr"])

        optimizer.register_load_state_dict_post_hook(adapt)
        curve = ConfiguredLambdaLR(optimizer, lambda step: self.factor(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": curve, "interval": "step"}}

    def factor(self, step: int, steps: int) -> float:
        """The share of `lr` at a step counted from 0."""
        warm = min(1.0, (step + 1) / max(self.warmup, 1))
        if self.decay == "constant" or steps <= 0:
            return warm
        progress = min(1.0, max(0, step - self.warmup) / max(1, steps - self.warmup))
        return warm * (0.5 + 0.5 * math.cos(math.pi * progress))


class ConfiguredLambdaLR(torch.optim.lr_scheduler.LambdaLR):
    """A learning-rate curve that goes on with the learning rate it was made with.

    A state dict has the step alone to say: the rest is the configuration's, which may have changed.
    """

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict({**state_dict, "base_lrs": self.base_lrs})
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = lr


def match_memory_layout(optimizer: torch.optim.Optimizer) -> None:
    """Lay loaded moments out in memory as their weights are.

    The fused AdamW walks through memory and heeds no strides: moments from a file that was written
    with another layout would go to other weights, without an error (seen with torch 2.13).
    """
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == weight.shape and value.stride() != weight.stride():
                state[name] = torch.empty_like(weight).copy_(value)
