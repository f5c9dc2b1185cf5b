"""Contrastive training of a CLIP on image-text pairs.

Shapes: B batch of this rank, G batch of all ranks, P width of the shared space.
"""

from collections.abc import Sequence
from pathlib import Path

import lightning as L
from torch import Tensor
from torchmetrics import MeanMetric

from ldm.models.clip import Clip, contrastive_loss, retrieval_accuracy
from ldm.training.optimizers import NetworkParameters


class ClipTraining(L.LightningModule):
    """The symmetric contrastive loss over the global batch (Radford et al. 2021, figure 3).

    Features are gathered across ranks with their gradients, so the loss does not depend on the
    number of ranks.
    """

    def __init__(self, clip: Clip, *, optimizer) -> None:
        super().__init__()
        self.clip = clip
        self.make_optimizer = optimizer
        self.val_loss, self.val_recall = MeanMetric(), MeanMetric()

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        images, texts = self.encode_pairs(batch)
        if self.trainer.world_size > 1:
            images = self.all_gather(images, sync_grads=True).flatten(0, 1)  # (G, P)
            texts = self.all_gather(texts, sync_grads=True).flatten(0, 1)  # (G, P)
        return contrastive_loss(images, texts, self.clip.logit_scale)

    def encode_pairs(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Returns unit vectors (B, P) of the images and of their captions."""
        return self.clip.encode_images(batch["images"]), self.clip.encode_texts(batch["captions"])

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        images, texts = self.encode_pairs(batch)
        loss = contrastive_loss(images, texts, self.clip.logit_scale)
        recall = retrieval_accuracy(images, texts, batch["captions"])
        self.val_loss.update(loss, weight=len(images))
        self.val_recall.update(recall, weight=len(images))

    def on_validation_epoch_end(self) -> None:
        self.log("val/loss", self.val_loss, prog_bar=True)
        self.log("val/recall_at_1", self.val_recall, prog_bar=True)

    def configure_optimizers(self) -> dict:
        return self.make_optimizer(NetworkParameters(self.clip), steps=self.trainer.max_steps)


class ClipFolderWriter(L.Callback):
    """Writes the model as a transformers folder after each validation, for `text_encoder=clip`.

    captions: training captions from which the whitening of the text states is measured.
    """

    def __init__(self, folder: Path, captions: Sequence[str]) -> None:
        self.folder = folder
        self.captions = captions

    def on_validation_end(self, trainer: L.Trainer, module: ClipTraining) -> None:
        if trainer.is_global_zero:
            module.clip.save(self.folder, module.clip.measure_whitening(self.captions))
