"""Frees the encoders that a training from a cache builds for its validations."""

import lightning as L

from ldm.models.deferred_encoders import DeferredModule


class DeferredRelease(L.Callback):
    """Frees deferred modules where a validation ends, after its images were generated."""

    def __init__(self, *modules: DeferredModule) -> None:
        self.modules = modules

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for deferred in self.modules:
            deferred.release()
