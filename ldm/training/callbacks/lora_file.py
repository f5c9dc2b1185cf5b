"""The adapters of a LoRA run as a file of their own, for other tools."""

import warnings
from pathlib import Path

import lightning as L

from ldm.models.lora_file import save_lora


class LoraFile(L.Callback):
    """Writes the averaged adapters at the end of a run; facts: see `save_lora`.

    On a full disk it gives a warning, and the run ends well: its checkpoint has the adapters.
    """

    def __init__(self, path: Path, **facts: float | str) -> None:
        self.path, self.facts = path, facts

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        try:
            save_lora(module.ema.module.state_dict(), self.path, **self.facts)
        except OSError as error:
            warnings.warn(f"{self.path} is not written ({error.strerror or error})", stacklevel=2)
