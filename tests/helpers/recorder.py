"""What a training saw, written down by a callback that the command line can name."""

import json
import os
import signal
from pathlib import Path
from typing import Literal

import lightning as L
from checkpoint_limits import limit_files

# For a command whose PYTHONPATH has this folder: the place of a run's own callback is its early
# stop, whose settings these replace.
NAMED = ["early_stop=patience", "early_stop._target_=recorder.Recorder", "+early_stop.folder=seen"]
NAMED += [f"~early_stop.{key}" for key in ("metric", "direction", "validations", "min_delta")]


class Recorder(L.Callback):
    """Appends a line for each micro-batch whose gradient was taken, one file a process.

    leave_at: the last rank sends itself a SIGTERM in this optimizer step.
    """

    def __init__(self, folder: str, *, leave_at: int | None = None) -> None:
        self.file = Path(folder) / f"{os.getpid()}.jsonl"
        self.leave_at = leave_at

    def on_train_batch_start(self, trainer: L.Trainer, module, batch: dict, batch_idx: int) -> None:
        self.line = {"step": trainer.global_step + 1, "rank": trainer.global_rank}
        self.line |= {"world": trainer.world_size, "keys": batch["key"]}
        self.line |= {"positions": batch["position"]}

    def on_after_backward(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.file.parent.mkdir(exist_ok=True)
        with self.file.open("a") as file:
            file.write(json.dumps(self.line) + "\n")
        last = trainer.global_rank == trainer.world_size - 1
        if last and self.line["step"] == self.leave_at:
            os.kill(os.getpid(), signal.SIGTERM)


class Break(L.Callback):
    """Cuts or removes a file after an optimizer step, as a failing disk would."""

    def __init__(self, file: str, *, after: int, how: Literal["cut", "removed"]) -> None:
        self.file = Path(file)
        self.after = after
        self.how = how

    def on_train_batch_end(self, trainer: L.Trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.is_global_zero and trainer.global_step == self.after and self.file.exists():
            if self.how == "cut":
                os.truncate(self.file, 700)
            else:
                self.file.unlink()


class FillDisk(L.Callback):
    """After an optimizer step no file of this process grows beyond some bytes, at last to 100."""

    def __init__(self, *, after: int, room: int) -> None:
        self.after = after
        self.room = room

    def on_train_batch_end(self, trainer: L.Trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.after:
            limit_files(self.room)

    def on_validation_end(self, trainer: L.Trainer, module) -> None:
        if trainer.global_step == trainer.max_steps:
            limit_files(100)


def read(folder: Path) -> list[dict]:
    """All lines of all processes."""
    return [json.loads(line) for file in folder.iterdir() for line in file.read_text().splitlines()]
