"""Ends a run at a stop signal or after `trainer.max_hours`: saves at the next step, then exits."""

import math
import time
from collections.abc import Callable

import lightning as L

from ldm.training.lightning_adapter import replace_signal_handlers
from ldm.utils.signals import StopSignals


class PreemptionHandler(L.Callback):
    """Ends the training after the step, with a checkpoint, once `signals` has received one.

    One rank may get the signal, or all. Several ranks agree where the training begins and every
    `every` steps, because they wait for the device then. It raises SystemExit with the exit code
    of `signals`.
    max_hours: of this process; after them the run ends as after SIGTERM.
    """

    def __init__(
        self,
        save: Callable[[L.Trainer], None],
        *,
        every: int,
        max_hours: float | None = None,
        signals: StopSignals | None = None,
    ) -> None:
        self.save, self.every = save, every
        self.ends_at = math.inf if max_hours is None else time.monotonic() + max_hours * 3600
        self.signals = signals or StopSignals()

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        replace_signal_handlers(trainer, self.signals.listen)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.last_checked_step = trainer.global_step
        self.signals.listen()  # a logger may have installed its own handlers
        self.signals.at_once = False
        if trainer.strategy.reduce_boolean_decision(self.signals.received is not None, all=False):
            self._exit(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, module, outputs, batch, batch_idx) -> None:
        step = trainer.global_step
        if step == self.last_checked_step or (trainer.world_size > 1 and step % self.every):
            return
        if step >= trainer.max_steps > 0:
            return  # the run ends anyway, with a last validation and a checkpoint
        self.last_checked_step = step
        self.exit_if_signalled(trainer)

    def exit_if_signalled(self, trainer: L.Trainer) -> None:
        """Saves and exits if any rank received a signal; all ranks take part."""
        received = self.signals.received is not None
        due = received or time.monotonic() >= self.ends_at
        if trainer.strategy.reduce_boolean_decision(due, all=False):
            if not received and trainer.is_global_zero:
                print("its time is over: saving, then leaving", flush=True)
            if trainer.state.fn == "fit":  # before the first step there is nothing to save
                self.save(trainer)
            self._exit(trainer)

    def _exit(self, trainer: L.Trainer) -> None:
        trainer.strategy.barrier()
        raise SystemExit(self.signals.code())
