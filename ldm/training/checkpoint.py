"""Saving and resuming inside Lightning, on the files of `ldm.checkpoint`."""

from pathlib import Path

import lightning as L
from lightning.fabric.plugins import CheckpointIO

from ldm import checkpoint as files


class SafeCheckpointIO(CheckpointIO):
    """Lightning's door to `ldm.checkpoint`: verified files, and no pickled objects."""

    def save_checkpoint(self, checkpoint: dict, path, storage_options=None) -> None:
        files.write(checkpoint, Path(path))

    def load_checkpoint(self, path, map_location=None, weights_only: bool | None = None) -> dict:
        return files.read(Path(path))

    def remove_checkpoint(self, path) -> None:
        files.remove(Path(path))


class Checkpoints(L.Callback):
    """Saves every `every` optimizer steps and at the end, and keeps the `keep` newest.

    A save is a new file; `last.ckpt` is turned to it once it is complete, and only then is the
    oldest one deleted: at no moment is there less than one good checkpoint.
    `facts` are plain values stored with each: the configuration, the digests of frozen parts.
    """

    def __init__(self, folder: Path, *, every: int, keep: int, facts: dict) -> None:
        if every < 1 or keep < 1:
            raise ValueError("checkpoint.every and checkpoint.keep must be 1 or more")
        self.folder = folder
        self.every = every
        self.keep = keep
        self.facts = facts
        self.saved = -1

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.saved = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.global_step % self.every == 0 and trainer.global_step != self.saved:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # Even at a step that is saved: a last validation came after it. The name is another one,
        # because a file that is being replaced is for a moment no checkpoint.
        self.save(trainer, suffix="_end")

    def save(self, trainer: L.Trainer, *, suffix: str = "") -> None:
        """Write the checkpoint of this step; all ranks take part."""
        self.saved = trainer.global_step
        path = self.folder / f"step={trainer.global_step:08d}{suffix}.ckpt"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            files.link_last(path)
            files.keep_newest(self.folder, self.keep)

    def on_save_checkpoint(self, trainer: L.Trainer, module, checkpoint: dict) -> None:
        checkpoint["ldm"] = {**self.facts, "images_seen": trainer.datamodule.position}

    def on_load_checkpoint(self, trainer: L.Trainer, module, checkpoint: dict) -> None:
        trainer.datamodule.position = int(checkpoint["ldm"]["images_seen"])
