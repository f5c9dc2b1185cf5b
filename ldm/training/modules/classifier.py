"""Training of a classifier on noisy latents, for classifier guidance.

Shapes: B batch of this rank, G batch of all ranks, C latent channels, h w latent grid, S width of
the shared space.
"""

from collections.abc import Sequence
from hashlib import blake2b

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from ldm.diffusion.rng import rand, randn
from ldm.diffusion.schedules import expand_dims_like
from ldm.models.noisy_classifier import NoisyClassifier
from ldm.training.optimizers import NetworkParameters
from ldm.training.randomness import make_batch_generators
from ldm.training.step_clock import StepClock
from ldm.utils.transfer import send

NUM_RECALL_BANDS = 8  # val/recall_t0 .. t7: the same equal parts of t as LatentDiffusion's


class ClassifierTraining(L.LightningModule):
    """Classifies the caption, or its name, of latents at a uniform t.

    With names the loss is cross-entropy over all of them (Dhariwal and Nichol 2021, section 4);
    else the symmetric contrastive loss over the global batch, in which equal captions are equally
    right. Autoencoder and text encoder are frozen, used and not stored. Random numbers of an image
    depend only on (seed, position of the image in the run).
    """

    clock: StepClock | None = None  # set by ThroughputMonitor

    def __init__(
        self,
        classifier: NoisyClassifier,
        autoencoder: nn.Module,
        *,
        optimizer,
        seed: int = 0,
        rng: str = "philox",
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.frozen = (autoencoder.eval().requires_grad_(False), classifier.text)
        self.make_optimizer = optimizer
        self.seed, self.rng = seed, rng
        self.accuracy_name = "accuracy" if classifier.has_names else "recall"
        bands = (f"{self.accuracy_name}_t{band}" for band in range(NUM_RECALL_BANDS))
        self.val = nn.ModuleDict({name: MeanMetric() for name in ("loss", *bands)})
        self.val_accuracy = MeanMetric()

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        x0, pooled = self.encode(batch)
        if self.clock is not None:
            self.clock.mark("encoders")
        t = rand(len(x0), make_batch_generators(self, batch, "time"), device=x0.device)
        images = self.encode_noisy_latents(x0, t, self.draw_noise(batch, "noise", x0))
        return self.loss(images, pooled, batch["captions"])

    @torch.no_grad()
    def encode(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Returns latents (B, C, h, w) of a batch, and the pooled states of its captions."""
        autoencoder, text = self.frozen
        generators = make_batch_generators(self, batch, "posterior")
        x0 = autoencoder.encode(batch["images"], generator=generators)
        return x0, text(batch["captions"]).pooled

    def draw_noise(self, batch: dict, stream: str, x0: Tensor) -> Tensor:
        """Returns normal noise in the shape of x0 (B, C, h, w)."""
        generators = make_batch_generators(self, batch, stream)
        return randn(x0.shape, generators, device=x0.device, dtype=x0.dtype)

    def encode_noisy_latents(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Returns the tower's vectors (B, S) of x_t at t (B,), snapped to the schedule."""
        tower = self.classifier.tower
        t = tower.schedule.snap(t)
        alpha, sigma = (expand_dims_like(part, x0).to(x0.dtype) for part in tower.schedule(t))
        return tower(alpha * x0 + sigma * eps, t)

    def loss(self, images: Tensor, pooled: Tensor, captions: Sequence[str]) -> Tensor:
        """Returns the mean () over the global batch; without names all ranks take part."""
        if self.classifier.has_names:
            return F.cross_entropy(self.classifier.class_log_probs(images), pooled)
        texts = self.classifier.encode_texts(pooled)
        ids = send(hash_captions(captions), images.device)
        if self.training and self.trainer.world_size > 1:
            images = self.all_gather(images, sync_grads=True).flatten(0, 1)  # (G, S)
            texts = self.all_gather(texts, sync_grads=True).flatten(0, 1)  # (G, S)
            ids = self.all_gather(ids).flatten(0, 1)  # (G,)
        return multi_positive_contrastive_loss(self.classifier.similarity(images, texts), ids)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        x0, pooled = self.encode(batch)
        eps = self.draw_noise(batch, "val noise", x0)
        within = rand(len(x0), make_batch_generators(self, batch, "val time"), device=x0.device)
        for band in range(NUM_RECALL_BANDS):
            images = self.encode_noisy_latents(x0, (band + within) / NUM_RECALL_BANDS, eps)
            loss = self.loss(images, pooled, batch["captions"])
            accuracy = self.measure_accuracy(images, pooled, batch["captions"])
            self.val["loss"].update(loss, weight=len(x0))
            for metric in (self.val[f"{self.accuracy_name}_t{band}"], self.val_accuracy):
                metric.update(accuracy, weight=len(x0))

    def measure_accuracy(self, images: Tensor, pooled: Tensor, captions: Sequence[str]) -> Tensor:
        """Returns the share () of images whose likeliest name (or batch caption) is right."""
        if self.classifier.has_names:
            best = self.classifier.class_log_probs(images).argmax(1)  # (B,)
            return pooled.gather(1, best[:, None]).mean()
        ids = send(hash_captions(captions), images.device)
        texts = self.classifier.encode_texts(pooled)
        best = self.classifier.similarity(images, texts).argmax(1)  # (B,)
        return (ids[best] == ids).float().mean()

    def on_validation_epoch_end(self) -> None:
        for name, metric in self.val.items():
            self.log(f"val/{name}", metric, prog_bar=name == "loss")
        whole = "accuracy" if self.classifier.has_names else "recall_at_1"
        self.log(f"val/{whole}", self.val_accuracy, prog_bar=True)

    def on_fit_start(self) -> None:
        for part in self.frozen:
            part.to(self.device)

    on_validation_start = on_fit_start

    def configure_optimizers(self) -> dict:
        return self.make_optimizer(NetworkParameters(self.classifier), steps=self.trainer.max_steps)


def hash_captions(captions: Sequence[str]) -> Tensor:
    """Returns a number (B,), int64, for each caption; equal captions share it on all ranks."""
    digests = (blake2b(caption.encode("utf-8", "replace"), digest_size=8) for caption in captions)
    return torch.tensor([int.from_bytes(d.digest(), "big", signed=True) for d in digests])


def multi_positive_contrastive_loss(logits: Tensor, caption_ids: Tensor) -> Tensor:
    """Symmetric InfoNCE () where row i and column j (G, G) are a pair if their ids are equal.

    If all captions differ, it is CLIP's loss; rows of equal captions share their target.
    """
    with torch.autocast(logits.device.type, enabled=False):
        pairs = (caption_ids[:, None] == caption_ids).to(logits.dtype)  # (G, G)
        targets = pairs / pairs.sum(1, keepdim=True)
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
