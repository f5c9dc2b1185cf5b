"""Snapshots of a run's power-function averages, from which `ldm.phema` makes any other."""

import warnings
from pathlib import Path

import lightning as L

from ldm.utils.ema_files import delete_snapshots_after, write_snapshot


class EMASnapshots(L.Callback):
    """Writes <folder>/step=*.safetensors every `every` optimizer steps and at the end.

    A snapshot that cannot be written, on a full disk, gives one warning, and the training goes on.
    A resumed run writes the snapshots of repeated steps again, with the same bytes.
    """

    def __init__(self, folder: Path, *, every: int) -> None:
        self.folder = folder
        self.every = every
        self.has_warned = False

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.written = 0  # step 0 has no average
        if trainer.is_global_zero:  # later snapshots are of a call that left no checkpoint
            delete_snapshots_after(self.folder, after=trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.global_step % self.every == 0:
            self._write(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._write(trainer, module)

    def _write(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step == self.written or not trainer.is_global_zero:
            return
        self.written = trainer.global_step
        pairs = zip(module.phema.lengths, module.phema.tracks, strict=True)
        states = {length: track.state_dict() for length, track in pairs}
        try:
            write_snapshot(self.folder, trainer.global_step, states)
        except OSError as error:
            if not self.has_warned:
                reason = error.strerror or error
                warnings.warn(
                    f"a snapshot cannot be written to {self.folder} ({reason}); the training goes "
                    "on",
                    stacklevel=2,
                )
            self.has_warned = True
