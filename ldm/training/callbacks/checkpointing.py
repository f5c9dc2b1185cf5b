"""When a run saves a checkpoint, what the checkpoint says of the run, and how a run resumes."""

import math
from pathlib import Path
from typing import Literal

import lightning as L

from ldm.training.callbacks.best_checkpoints import BestCheckpoints
from ldm.training.callbacks.checkpoint_storage import CheckpointWriter
from ldm.training.callbacks.nonfinite import (
    NonFiniteStepSkipper,
    check_finite_weights,
    find_non_finite_metrics,
)
from ldm.training.lightning_adapter import (
    count_micro_steps,
    detach_ranks,
    reset_loop_progress,
    run_validation,
    set_max_steps,
)
from ldm.utils.checkpoint_file import CheckpointError, manifest_path
from ldm.utils.signals import STOP_SIGNALS

IMMEDIATE_EXIT_CODES = {128 + number for number in STOP_SIGNALS}


class Checkpoints(L.Callback):
    """Saves every `every` optimizer steps and at the end; keeps the `keep` newest and the best.

    A save is a new file. `last.ckpt` is turned to it once it is complete, and only then is the
    oldest file deleted: there is always at least one good checkpoint. Weights that are not finite
    are never saved (NotFiniteError). While steps are skipped, or if the last validation was not
    finite, older files stay. The `keep_best` files with the best `metric` in their validation stay
    as well; `best.ckpt` links to the first of them.
    A save that fails for lack of space or rights gives a warning, and training goes on; only if
    the last save of the run fails, CheckpointError is raised.
    background: training waits only for a copy in host memory, and a thread writes it. "auto": if
    the copy is small in that memory, which is found out at the first save.
    weights: each save also writes weights/step=*.safetensors next to `folder`.
    facts: plain values stored with each checkpoint, such as the configuration.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every: int,
        keep: int,
        facts: dict,
        keep_best: int = 0,
        metric: str = "val/loss",
        direction: str = "minimize",
        background: bool | Literal["auto"] = False,
        weights: bool = False,
        skipper: NonFiniteStepSkipper | None = None,
    ) -> None:
        self.folder, self.every, self.facts, self.metric = folder, every, facts, metric
        self.skipper = skipper
        self.best = BestCheckpoints(
            folder=folder, keep=keep_best, metric=metric, direction=direction
        )
        self.writer = CheckpointWriter(
            folder=folder, keep=keep, best=self.best, background=background, weights=weights
        )
        self.saved = self.loaded = -1
        self.images_seen = 0  # up to the last whole step
        self.validated = -1  # the step of the last validation
        self.owes_validation = False  # the run ended between a save and the validation after it
        self.last_sound_step = -1  # the last one that validated well, or the first of this process
        self.unsound_from: int | None = None  # the first step with a non-finite validation since

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.max_steps, name = trainer.max_steps, Path(trainer.ckpt_path or "").resolve().stem
        if self.loaded >= self.max_steps > 0 and not name.endswith("_end"):
            # Lightning starts no training without a step left: until on_train_start there is one.
            self.owes_validation = True
            set_max_steps(trainer, self.loaded + 1)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.saved = self.last_sound_step = trainer.global_step
        self.images_seen = trainer.datamodule.position
        if trainer.is_global_zero:
            self.best.read()
        set_max_steps(trainer, self.max_steps)
        if self.owes_validation:
            self.owes_validation = False
            run_validation(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, module, outputs, batch, batch_idx) -> None:
        if count_micro_steps(trainer) % trainer.accumulate_grad_batches == 0:
            self.images_seen = trainer.datamodule.position
        if not self.writer.is_busy:
            self.wait()
        if trainer.global_step % self.every == 0 and trainer.global_step != self.saved:
            self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        self.validated = trainer.global_step
        if find_non_finite_metrics(trainer.callback_metrics, self.metric):
            self.unsound_from = self.unsound_from or self.last_sound_step + 1
        else:
            self.last_sound_step, self.unsound_from = self.validated, None
        if self.best.keep:
            self._save_if_best(trainer)

    def _save_if_best(self, trainer: L.Trainer) -> None:
        value = float(trainer.callback_metrics.get(self.metric, math.nan))
        if not trainer.strategy.broadcast(self.best.accepts(value)):
            return
        self.wait()
        at_end = trainer.global_step >= trainer.max_steps > 0
        path = self.path(trainer.global_step, "_end" if at_end else "")
        self.best.propose(path.name, value)
        if at_end:
            return  # on_train_end saves it
        if self.saved != trainer.global_step:
            self.save(trainer)
        elif trainer.is_global_zero and manifest_path(path).is_file():
            self.writer.save_best(path)
        else:  # it could not be saved
            self.best.cancel()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # Even if this step is saved: a validation came after it. The name differs, because a file
        # that is being replaced is not a valid checkpoint for a moment.
        self.save(trainer, suffix="_end")
        self.wait()
        if problem := trainer.strategy.broadcast(self.writer.problem):
            raise CheckpointError(f"the run's last checkpoint is missing: {problem}")

    def on_exception(self, trainer: L.Trainer, module, exception: BaseException) -> None:
        # A second signal ends the run at once (see preemption.py): its exit code is 128 or more.
        if not isinstance(exception, SystemExit) or exception.code not in IMMEDIATE_EXIT_CODES:
            detach_ranks(trainer)
            self.wait()

    def on_save_checkpoint(self, trainer: L.Trainer, module, checkpoint: dict) -> None:
        at_validation = count_micro_steps(trainer) % trainer.val_check_batch == 0
        due = at_validation and self.validated < trainer.global_step
        facts = {"images_seen": self.images_seen, "validated": not due, "finite": True}
        checkpoint["ldm"] = {**self.facts, **trainer.datamodule.rules(), **facts}
        doubts = self.unsound_from, self._find_first_skipped_step(trainer)
        if doubts := [step for step in doubts if step is not None]:
            checkpoint["ldm"]["doubtful_from"] = min(doubts)
        if self.best.keep:
            checkpoint["ldm"]["best"] = {"metric": self.metric, "values": dict(self.best.pending)}

    def on_load_checkpoint(self, trainer: L.Trainer, module, checkpoint: dict) -> None:
        trainer.datamodule.resume(checkpoint["ldm"])
        self.owes_validation = not checkpoint["ldm"].get("validated", True)
        self.unsound_from = checkpoint["ldm"].get("doubtful_from")
        self.loaded = checkpoint["global_step"]
        self.best.adopt(checkpoint["ldm"].get("best", {}))
        reset_loop_progress(checkpoint, self.loaded * trainer.accumulate_grad_batches)

    def save_now(self, trainer: L.Trainer) -> None:
        """Saves this step, if it is not saved, and waits; all ranks take part."""
        if self.saved != trainer.global_step:
            self.save(trainer)
        self.wait()

    def save(self, trainer: L.Trainer, *, suffix: str = "") -> None:
        """Writes the checkpoint of this step, or starts to; all ranks take part.

        Raises NotFiniteError where its weights are not finite.
        """
        skipped_from = self._find_first_skipped_step(trainer)
        check_finite_weights(trainer, self.folder, skipped_from=skipped_from)
        self.saved = trainer.global_step
        for logger in trainer.loggers:
            logger.save()  # the rows of this step must be on the disk before its checkpoint
        path = self.path(trainer.global_step, suffix)
        trainer.save_checkpoint(path, storage_options=self.writer.save)

    def _find_first_skipped_step(self, trainer: L.Trainer) -> int | None:
        return self.skipper.find_first_skipped_step(trainer.global_step) if self.skipper else None

    def path(self, step: int, suffix: str = "") -> Path:
        """Returns the file of a step."""
        return self.folder / f"step={step:08d}{suffix}.ckpt"

    def wait(self) -> None:
        """Waits for the save that is under way, and warns if it failed."""
        self.writer.wait()
