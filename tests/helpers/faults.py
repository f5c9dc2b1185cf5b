"""What may go wrong in a training: a full disk, and numbers that are not finite."""

import resource
from collections.abc import Callable, Mapping

import lightning as L
import torch

from ldm.training.modules.diffusion import LatentDiffusion


class At(L.Callback):
    """Does things before certain steps, first waiting for what is being saved."""

    def __init__(self, what: Mapping[int, Callable[[], object]], *, wait: bool = True) -> None:
        self.what = what
        self.wait = wait

    def on_train_batch_start(self, trainer: L.Trainer, *args) -> None:
        if trainer.global_step + 1 in self.what:
            if self.wait:
                trainer.callbacks[-1].wait()
            self.what[trainer.global_step + 1]()


def limit_files(size: int) -> None:
    """The kernel refuses to let a file of this process grow larger."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


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
