"""Leaving in good order when asked to: save at the next optimizer step, then go."""

import math
import os
import signal
import subprocess
import time
from collections.abc import Callable

import lightning as L

AGAIN = 75  # EX_TEMPFAIL of sysexits.h: try again


class StopOnSignal(L.Callback):
    """SIGTERM, SIGUSR1, SIGUSR2 or SIGINT ends the training after the step, with a checkpoint.

    The second signal, a second later or more, ends it at once. One process may be told or all:
    several agree every `every` steps, because to agree is to wait for the device. It raises
    SystemExit, with code 75 ("the same command goes on"), or 130 after SIGINT. Lightning's own
    handlers, which save in the middle of whatever happens and wait for ranks that may wait for
    something else, are replaced.
    Under SLURM the user signals say that the time limit is near: the job is requeued.
    max_hours: of this process; after them it leaves as after SIGTERM. ValueError where they are
    not above 0.
    """

    def __init__(
        self, save: Callable[[L.Trainer], None], *, every: int, max_hours: float | None = None
    ) -> None:
        if max_hours is not None and not max_hours > 0:
            raise ValueError(f"trainer.max_hours={max_hours} must be above 0")
        self.save = save
        self.every = every
        self.ends_at = math.inf if max_hours is None else time.monotonic() + max_hours * 3600
        self.received: int | None = None
        self.received_at = 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.asked_at = trainer.global_step
        self._listen()

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._listen()  # the one before the first step, and one that is made up for, may be long

    def _listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame) -> None:
        if self.received is not None:
            if time.monotonic() > self.received_at + 1:  # SLURM sends some in pairs
                raise SystemExit(128 + number)
            return
        self.received, self.received_at = number, time.monotonic()
        print(f"{signal.Signals(number).name}: saving after this step, then leaving", flush=True)

    def on_train_batch_end(self, trainer: L.Trainer, module, outputs, batch, batch_idx) -> None:
        step = trainer.global_step
        if step == self.asked_at or (trainer.world_size > 1 and step % self.every):
            return
        if step >= trainer.max_steps > 0:
            return  # it ends by itself, with a last validation and a checkpoint
        self.asked_at = step
        self.leave_if_told(trainer)

    def leave_if_told(self, trainer: L.Trainer) -> None:
        """Save and leave where any rank was told to; for long work, where all ranks come alike."""
        told = self.received is not None or time.monotonic() >= self.ends_at
        if trainer.strategy.reduce_boolean_decision(told, all=False):
            if self.received is None and trainer.is_global_zero:
                print("its time is over: saving, then leaving", flush=True)
            if trainer.state.fn == "fit":  # before the first step there is nothing to save
                self.save(trainer)
            trainer.strategy.barrier()
            if trainer.is_global_zero and self.received in (signal.SIGUSR1, signal.SIGUSR2):
                requeue()
            raise SystemExit(130 if self.received == signal.SIGINT else AGAIN)


def requeue() -> None:
    """Ask SLURM to run this job again, where it is one."""
    if number := os.environ.get("SLURM_JOB_ID"):
        subprocess.run(["scontrol", "requeue", number], check=False, timeout=60)
