"""Two processes with half the batch each have the gradients that one has with all of it.

In double, where sums in another order agree to 1e-15 and every fault of the loss would be seen:
a rank that draws for the other's pictures, sees only its own captions, or counts twice. Weights
after some steps do not show that: Adam makes a whole step of a gradient that is only rounding.
"""

import copy
import os

import lightning as L
import pytest
import torch
from autoencoder_modules import autoencoder_training
from classifier_modules import training as classifier_training
from several import several
from torch import Tensor, distributed
from world import latent_diffusion, make_trainer, shapes_data, small_autoencoder

from ldm.models.text.clip import ClipTextEncoder
from ldm.training.modules.clip import ClipTraining
from ldm.training.optimizers import AdamW

STEPS = 2


class Gradients(L.Callback):
    """Pictures in double, and the gradients of each step as the optimizer gets them."""

    def __init__(self) -> None:
        self.seen = []

    def on_train_batch_start(self, trainer, module, batch: dict, *place: int) -> None:
        batch["images"] = batch["images"].double()

    on_validation_batch_start = on_train_batch_start

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        self.seen.append({name: grad.clone() for name, grad in grads.items()})


@pytest.mark.parametrize("stage", ["diffusion", "autoencoder", "clip", "names", "captions"])
def test_two_processes_have_the_gradients_of_one(shapes, tiny_clip, tmp_path, stage):
    tiny_clip.save(tmp_path / "clip")

    def module() -> L.LightningModule:
        text = ClipTextEncoder(str(tmp_path / "clip"), pooled=True)
        match stage:
            case "diffusion":
                return latent_diffusion(text, autoencoder=small_autoencoder())
            case "autoencoder":
                return autoencoder_training()
            case "clip":
                return ClipTraining(copy.deepcopy(tiny_clip), optimizer=AdamW(lr=1e-3))
            case "names":
                return classifier_training(autoencoder=small_autoencoder())
            case "captions":
                return classifier_training(text, autoencoder=small_autoencoder())

    def work() -> list[dict[str, Tensor]]:
        trained, seen, how = module().double(), Gradients(), {}
        frozen = getattr(trained, "frozen", ())
        if stage == "diffusion":
            frozen = trained.components.frozen.values()
        for part in frozen:
            part.double()
        if distributed.is_initialized():
            os.environ["LOCAL_RANK"] = str(distributed.get_rank())  # Lightning starts no others
            how = {"devices": 2, "strategy": "ddp"}
        trainer = make_trainer(steps=STEPS, callbacks=[seen], **how)
        trainer.fit(trained, datamodule=shapes_data(shapes))
        return seen.seen

    alone, together = work(), several(2, work, tmp_path)
    for gradients in together:
        for one, other in zip(alone, gradients, strict=True):
            largest = torch.stack([gradient.abs().max() for gradient in one.values()]).max()
            assert largest > 1e-3
            for name, gradient in one.items():
                assert (other[name] - gradient).abs().max() < 1e-12 * largest, name
