"""Equality of two trainings: checkpoints, batches and validations."""

from pathlib import Path

import lightning as L
import torch

from ldm.utils.checkpoint_file import read_checkpoint


class Validations(L.Callback):
    """The steps after which there was a validation, and what it found."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.losses: dict[int, float] = {}

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.steps.append(trainer.global_step)
        self.losses[trainer.global_step] = float(trainer.callback_metrics["val/loss"])


def assert_same(a, b, where: str = "") -> None:
    """Two checkpoints, value for value; tensors bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_training(a: Path, b: Path) -> None:
    a, b = read_checkpoint(a), read_checkpoint(b)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "ldm"):
        assert_same(a[part], b[part], part)
