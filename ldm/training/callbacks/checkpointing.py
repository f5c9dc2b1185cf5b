"""Saving and resuming inside Lightning, on the files of `ldm.utils.checkpoint_file`."""

import json
import math
import re
import shutil
import signal
import threading
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path
from subprocess import Popen

import lightning as L
import torch
from torch import Tensor

from ldm.data.bad_samples import TooManySkippedError
from ldm.data.image_decoding import ImageError
from ldm.data.shards.remote import RemoteError
from ldm.data.shards.tar_headers import ShardError
from ldm.training.callbacks.checkpoint_payload import copy_to_host, reset_loop_progress
from ldm.training.callbacks.nonfinite import (
    are_weights_finite,
    check_finite_weights,
    find_first_skipped_step,
    find_non_finite_metrics,
)
from ldm.training.distributed import (
    detach_ranks,
    has_sharded_weights,
    lock_checkpoint_writer,
    wait_for_file,
)
from ldm.utils.checkpoint_file import (
    CheckpointError,
    count_tensor_bytes,
    export_weights,
    find_last_good_checkpoint,
    is_valid_checkpoint,
    link_checkpoint,
    link_last_checkpoint,
    manifest_path,
    prune_checkpoints,
    write_checkpoint,
)
from ldm.utils.files import write_text

DATA_ERRORS = (RemoteError, ShardError, ImageError, TooManySkippedError)
CHECKPOINT_NAME_PATTERN = re.compile(
    r"step=\d{8,}(_end)?\.ckpt"
)  # names of ours, which lead to no other folder
BEST_CHECKPOINTS_FILE = "best.json"  # which files validated best, and their values
IMMEDIATE_EXIT_CODES = {
    128 + number for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
}


class Checkpoints(L.Callback):
    """Saves every `every` optimizer steps and at the end; keeps the `keep` newest and the best.

    A save is a new file; `last.ckpt` is turned to it once it is complete, and only then is the
    oldest one deleted: at no moment is there less than one good checkpoint. Weights that are not
    finite are never saved (NotFiniteError), and while steps are left out, or the last validation
    was not finite, the files from before that stay. `keep_best` more stay that had the best
    `metric` in their validation; `best.ckpt` is a link to the first of them.
    A save that fails for want of room or rights is told, and training goes on; only where the last
    one of the run does, CheckpointError is raised.
    background: the training waits for a copy in memory alone, a thread writes it. The copy's
    memory, as much as the checkpoint, stays taken.
    weights: each save also writes weights/step=*.safetensors beside `folder`, and none is deleted.
    `facts` are plain values stored with each: the configuration, the digests of frozen parts.
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
        background: bool = False,
        weights: bool = False,
    ) -> None:
        if every < 1 or keep < 1:
            raise ValueError("checkpoint.every and checkpoint.keep must be 1 or more")
        if keep_best < 0:
            raise ValueError(f"checkpoint.keep_best={keep_best} must be 0 or more")
        if direction not in ("minimize", "maximize"):
            raise ValueError(f"direction={direction} is neither minimize nor maximize")
        self.folder = folder
        self.every = every
        self.keep = keep
        self.facts = facts
        self.keep_best = keep_best
        self.metric = metric
        self.sign = 1 if direction == "minimize" else -1
        self.background = background
        self.weights = weights
        self.saved = self.loaded = -1
        self.seen = 0  # images, up to the last whole step
        self.is_distributed = False  # ranks, any of which may come to write
        self.started: list[Popen] = []  # the other ranks, once this one has failed
        self.validated = -1  # the step of the last validation
        self.owes_validation = False  # where a run was ended between a save and what it preceded
        self.last_sound_step = -1  # the last one that validated well, or the first of this process
        self.unsound_from: int | None = None  # where a validation was not finite since
        self.doubtful_from: int | None = None  # the same, or where a row of left out steps began
        self.best: dict[str, float] = {}  # file name -> value, the best first
        self.best_next = self.best  # as it will be once what is being saved is whole
        self.writing: threading.Thread | None = None
        self.error: BaseException | None = None  # of the save that came last, until it is told
        self.problem: str | None = None  # the same in words
        self.pool: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.max_steps, at = trainer.max_steps, Path(trainer.ckpt_path or "").resolve().stem
        if self.loaded >= self.max_steps > 0 and not at.endswith("_end"):
            # Lightning begins no training without a step left: until on_train_start there is one.
            self.owes_validation, trainer.fit_loop.epoch_loop.max_steps = True, self.loaded + 1

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.first_step = self.saved = self.last_sound_step = trainer.global_step
        self.seen = trainer.datamodule.position
        self.is_distributed = trainer.world_size > 1
        if trainer.is_global_zero:
            self._read_best()
        trainer.fit_loop.epoch_loop.max_steps = self.max_steps
        if self.owes_validation:
            self.owes_validation = False
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def on_train_batch_end(self, trainer: L.Trainer, module, outputs, batch, batch_idx) -> None:
        if self._batches(trainer) % trainer.accumulate_grad_batches == 0:
            self.seen = trainer.datamodule.position
        if self.writing is None or not self.writing.is_alive():
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
        if not self.keep_best:
            return
        value = float(trainer.callback_metrics.get(self.metric, math.nan))
        bars = list(self.best_next.values())
        better = len(bars) < self.keep_best or self.sign * value < self.sign * bars[-1]
        if not trainer.strategy.broadcast(better and math.isfinite(value)):
            return
        self.wait()
        at_end = trainer.global_step >= trainer.max_steps > 0
        name = self.path(trainer.global_step, "_end" if at_end else "").name
        best = sorted({**self.best, name: value}.items(), key=lambda item: self.sign * item[1])
        self.best_next = dict(best[: self.keep_best])
        if at_end:
            return  # on_train_end saves it
        if self.saved != trainer.global_step:
            self.save(trainer)
        elif trainer.is_global_zero and manifest_path(self.folder / name).is_file():
            self._start(None, self.folder / name)
        else:  # it could not be saved
            self.best_next = self.best

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # Even at a step that is saved: a last validation came after it. The name is another one,
        # because a file that is being replaced is for a moment no checkpoint.
        self.save(trainer, suffix="_end")
        self.wait()
        if problem := trainer.strategy.broadcast(self.problem):
            raise CheckpointError(f"the run's last checkpoint is missing: {problem}")

    def on_exception(self, trainer: L.Trainer, module, exception: BaseException) -> None:
        # A second signal ends the run at once (see preemption.py): its exit code is 128 or more.
        if isinstance(exception, SystemExit) and exception.code in IMMEDIATE_EXIT_CODES:
            return
        self.started = detach_ranks(trainer)
        self.wait()
        # Data that is lost says nothing against what was trained.
        if isinstance(exception, DATA_ERRORS) and trainer.state.fn == "fit" and self.saved >= 0:
            self.save_from_one_rank(trainer, module)

    def on_save_checkpoint(self, trainer: L.Trainer, module, checkpoint: dict) -> None:
        facts = {"images_seen": self.seen, "validated": not self._is_due(trainer), "finite": True}
        checkpoint["ldm"] = {**self.facts, **trainer.datamodule.rules(), **facts}
        doubts = self.unsound_from, find_first_skipped_step(trainer)
        self.doubtful_from = min((step for step in doubts if step is not None), default=None)
        if self.doubtful_from is not None:
            checkpoint["ldm"]["doubtful_from"] = self.doubtful_from
        if self.keep_best:
            best = {"metric": self.metric, "values": dict(self.best_next)}
            checkpoint["ldm"]["best"] = best

    def on_load_checkpoint(self, trainer: L.Trainer, module, checkpoint: dict) -> None:
        trainer.datamodule.resume(checkpoint["ldm"])
        self.owes_validation = not checkpoint["ldm"].get("validated", True)
        self.unsound_from = checkpoint["ldm"].get("doubtful_from")
        self.loaded = checkpoint["global_step"]
        self._adopt_best(checkpoint["ldm"].get("best", {}))
        loops = checkpoint["loops"]["fit_loop"]
        reset_loop_progress(loops, checkpoint["global_step"] * trainer.accumulate_grad_batches)

    def _batches(self, trainer: L.Trainer) -> int:
        """Micro-steps of the run so far."""
        return trainer.fit_loop.epoch_loop.total_batch_idx + 1

    def _is_due(self, trainer: L.Trainer) -> bool:
        """Whether the batch that has ended is to be followed by a validation."""
        at_validation = self._batches(trainer) % trainer.val_check_batch == 0
        return self.validated < trainer.global_step and at_validation

    def _read_best(self) -> None:
        """Go on with the best that are written down."""
        with suppress(OSError, ValueError, TypeError, AttributeError, KeyError):
            self._adopt_best(json.loads((self.folder / BEST_CHECKPOINTS_FILE).read_text()))

    def _adopt_best(self, found: dict) -> None:
        """Go on with the best of before that are there, where they are so by the same metric."""
        if found.get("metric") == self.metric and self.keep_best:
            ours = (
                n
                for n in found["values"]
                if CHECKPOINT_NAME_PATTERN.fullmatch(n) and (self.folder / n).is_file()
            )
            self.best = self.best_next = {name: float(found["values"][name]) for name in ours}

    def save_now(self, trainer: L.Trainer) -> None:
        """Have this step saved when it returns; all ranks take part."""
        if self.saved != trainer.global_step:
            self.save(trainer)
        self.wait()

    def save(self, trainer: L.Trainer, *, suffix: str = "") -> None:
        """Write the checkpoint of this step, or begin to; all ranks take part.

        Raises NotFiniteError where its weights are not finite.
        """
        check_finite_weights(trainer, self.folder)
        self.saved = trainer.global_step
        for logger in trainer.loggers:
            logger.save()  # what belongs to this step must not be younger than its checkpoint
        path = self.path(trainer.global_step, suffix)
        trainer.save_checkpoint(path, storage_options=self._store)

    def save_from_one_rank(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Have the last whole step saved by this rank, which has all of it; no other takes part.

        The others need not know: they wait for this one, until it has failed.
        """
        step = trainer.global_step
        if self.saved == step:  # the first rank has done so, or is about it
            if step > self.first_step and not trainer.is_global_zero:
                wait_for_file(manifest_path(self.path(step)))
            return
        if not are_weights_finite(module.parameters()):
            print(f"what was trained after step {self.saved} is not saved: it is not finite")
            return
        if self.is_distributed and has_sharded_weights(module):
            print(f"what was trained after step {self.saved} is not saved: no rank has all weights")
            return
        for logger in trainer.loggers:
            logger.save()
        with lock_checkpoint_writer(self.folder) if self.is_distributed else nullcontext():
            if is_valid_checkpoint(self.path(step)):
                return  # another rank has failed as well, and was faster
            self._read_best()
            # What trainer.save_checkpoint stores, without its waiting for all ranks.
            payload = trainer._checkpoint_connector.dump_checkpoint()
            self.problem, self.target, self.needed = (
                None,
                self.path(step),
                count_tensor_bytes(payload),
            )
            self._write(payload, self.target)
        self.wait()

    def path(self, step: int, suffix: str = "") -> Path:
        """Where a step is saved."""
        return self.folder / f"step={step:08d}{suffix}.ckpt"

    def wait(self) -> None:
        """Wait for the save that is under way, and tell if it failed."""
        if self.writing is not None:
            self.writing.join()
            self.writing = None
        error, self.error = self.error, None
        if error is None:
            return
        if not isinstance(error, OSError):
            raise error
        self.best_next = self.best
        good = find_last_good_checkpoint(self.folder) or "none yet"
        free = shutil.disk_usage(self.folder).free if self.folder.is_dir() else 0
        self.problem = (
            f"saving {self.target} failed ({error.strerror or error}): it takes "
            f"{self.needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free. The last good "
            f"checkpoint is {good}"
        )
        warnings.warn(f"{self.problem}; the training goes on", stacklevel=2)

    def _store(self, payload: dict, path: Path) -> None:
        """What Lightning calls on rank 0 with the state of all ranks."""
        self.wait()
        if self.background:
            payload = copy_to_host(payload, self.pool)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        self._start(payload, path)

    def _start(self, payload: dict | None, path: Path) -> None:
        self.wait()
        self.problem, self.target = None, path
        self.needed = count_tensor_bytes(payload or {})
        if self.background:
            self.writing = threading.Thread(
                target=self._write_exclusively, args=(payload, path), daemon=True
            )
            self.writing.start()
        else:
            self._write_exclusively(payload, path)
            self.wait()

    def _write_exclusively(self, payload: dict | None, path: Path) -> None:
        with lock_checkpoint_writer(self.folder) if self.is_distributed else nullcontext():
            self._write(payload, path)

    def _write(self, payload: dict | None, path: Path) -> None:
        """All of a save that is slow; without a payload `path` is there. `wait` tells of errors."""
        try:
            if payload is not None:
                write_checkpoint(payload, path)
                link_last_checkpoint(path)
            if self.best_next is not self.best:
                content = {"metric": self.metric, "values": self.best_next}
                write_text(self.folder / BEST_CHECKPOINTS_FILE, json.dumps(content) + "\n")
                link_checkpoint(self.folder / next(iter(self.best_next)), "best.ckpt")
                self.best = self.best_next
            how = {"spare": self.best, "doubtful_from": self.doubtful_from}
            prune_checkpoints(self.folder, self.keep, **how)
            if self.weights and payload is not None:
                name = f"{path.stem}.safetensors"
                export_weights(payload, self.folder.parent / "weights" / name)
        except BaseException as error:
            self.error = error
