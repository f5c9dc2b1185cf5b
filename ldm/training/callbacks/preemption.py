"""Leaving in good order when asked to: save at the next optimizer step, then go."""

import math
import time
from collections.abc import Callable

import lightning as L

from ldm.utils.signals import StopSignals


class PreemptionHandler(L.Callback):
    """Ends the training after the step, with a checkpoint, once `signals` has received one.

    One process may get it or all: several agree where the training begins and every `every` steps,
    because to agree is to wait for the device. It raises SystemExit with the code of `signals`.
    Lightning's own handlers, which save in the middle of whatever happens, wait for ranks that may
    wait for something else, and end with exit code 0, are never installed.
    max_hours: of this process; after them it leaves as after SIGTERM. ValueError where they are
    not above 0.
    """

    def __init__(
        self,
        save: Callable[[L.Trainer], None],
        *,
        every: int,
        max_hours: float | None = None,
        signals: StopSignals | None = None,
    ) -> None:
        if max_hours is not None and not max_hours > 0:
            raise ValueError(f"trainer.max_hours={max_hours} must be above 0")
        self.save = save
        self.every = every
        self.ends_at = math.inf if max_hours is None else time.monotonic() + max_hours * 3600
        self.signals = signals or StopSignals()

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        # Lightning calls it before each of its stages, and has no switch for it.
        trainer._signal_connector.register_signal_handlers = self.signals.listen

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.last_checked_step = trainer.global_step
        self.signals.listen()  # a logger may have begun to
        self.signals.at_once = False
        if trainer.strategy.reduce_boolean_decision(self.signals.received is not None, all=False):
            self._leave(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, module, outputs, batch, batch_idx) -> None:
        step = trainer.global_step
        if step == self.last_checked_step or (trainer.world_size > 1 and step % self.every):
            return
        if step >= trainer.max_steps > 0:
            return  # it ends by itself, with a last validation and a checkpoint
        self.last_checked_step = step
        self.exit_if_signalled(trainer)

    def exit_if_signalled(self, trainer: L.Trainer) -> None:
        """Save and leave where any rank was told to; for long work, where all ranks come alike."""
        received = self.signals.received is not None
        told = received or time.monotonic() >= self.ends_at
        if trainer.strategy.reduce_boolean_decision(told, all=False):
            if not received and trainer.is_global_zero:
                print("its time is over: saving, then leaving", flush=True)
            if trainer.state.fn == "fit":  # before the first step there is nothing to save
                self.save(trainer)
            self._leave(trainer)

    def _leave(self, trainer: L.Trainer) -> None:
        trainer.strategy.barrier()
        raise SystemExit(self.signals.code())
