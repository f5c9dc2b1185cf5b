"""Trainings on shards with samples that cannot be read."""

import lightning as L
import torch

from ldm.data.datamodule import TextImageData


class Counting(L.LightningModule):
    """Remembers keys, and learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.keys, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.keys += batch["key"]
        self.trainer.datamodule.position += len(batch["key"])
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.validated += batch["key"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, *, steps: int = 10, **options) -> tuple[TextImageData, Counting]:
    data = TextImageData(
        train=str(folder), val=str(folder), size=8, batch_size=5, val_batch_size=5, **options
    )
    module = Counting()
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        val_check_interval=steps, check_val_every_n_epoch=None, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return data, module
