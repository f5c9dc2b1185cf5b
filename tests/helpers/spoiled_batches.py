"""A callback that puts NaN into given batches."""

import lightning as L
import torch

from ldm.training.modules.diffusion import LatentDiffusion


class Spoil(L.Callback):
    """Spoils the pictures, or the gradient, of certain micro-batches, counted from 0."""

    def __init__(self, *batches: int, gradient: bool = False) -> None:
        self.batches = batches
        self.gradient = gradient
        self.number = -1
        self.keys: list[list[str]] = []

    def on_train_batch_start(self, trainer, module, batch: dict, batch_idx: int) -> None:
        self.number += 1
        self.keys.append(batch["key"])
        if self.number in self.batches and not self.gradient:
            batch["images"][0, 0, 0, 0] = torch.nan

    def on_after_backward(self, trainer, module: LatentDiffusion) -> None:
        if self.number in self.batches and self.gradient:
            module.denoiser.conv_in.bias.grad[0] = torch.inf
