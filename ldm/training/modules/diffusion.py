"""Training of the denoiser on latents.

Shapes: B batch, C latent channels, H W pixels, h w latent grid.
"""

from collections.abc import Sequence
from dataclasses import replace

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from ldm.diffusion.conditioning import Condition
from ldm.diffusion.objective import Objective
from ldm.diffusion.rng import make_generators, rand, randn
from ldm.training.ema import EMA
from ldm.training.power_ema import PowerEMA

NUM_LOSS_BANDS = 8  # val/loss_t0 .. t7: equal parts of t


class LatentDiffusion(L.LightningModule):
    """The denoiser and its average are trained; autoencoder, text and style encoder are frozen.

    Frozen parts are used but not stored: `frozen` is a tuple, which Lightning neither saves nor
    wraps. What is drawn for an image depends on (seed, position of the image in the run) alone.
    Raises ValueError where `caption_dropout` is no share.
    """

    skipped: Tensor | None = None  # set by SkipNonFinite: 1.0 where this step is left out

    def __init__(
        self,
        denoiser: nn.Module,
        autoencoder: nn.Module,
        text: nn.Module,
        objective: Objective,
        task,
        *,
        optimizer,
        ema_decay: float = 0.9999,
        phema_lengths: Sequence[float] = (),
        caption_dropout: float = 0.1,
        validate_raw: bool = False,
        style_encoder: nn.Module | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"caption_dropout is a share from 0 to 1, got {caption_dropout}")
        self.denoiser = denoiser
        self.ema = EMA(denoiser, decay=ema_decay)
        self.phema = PowerEMA(denoiser, lengths=phema_lengths) if phema_lengths else None
        self.objective = objective
        self.task = task
        encoders = (text,) if style_encoder is None else (text, style_encoder)
        self.frozen = (autoencoder.eval().requires_grad_(False), *encoders)
        self.make_optimizer = optimizer
        self.caption_dropout = caption_dropout
        self.seed = seed
        self.captions = self.cut = 0  # of the data so far, and those cut; prompts do not count
        suffixes = ("", "_raw") if validate_raw else ("",)
        self.val_losses = nn.ModuleDict(
            {
                f"{name}{suffix}": MeanMetric(nan_strategy="disable")  # else it is left out
                for suffix in suffixes
                for name in ("loss", *(f"loss_t{band}" for band in range(NUM_LOSS_BANDS)))
            }
        )

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        x0, cond = self.encode(batch)
        noise = self.make_generators(batch, "noise")
        return self.objective.loss(
            self.denoiser, x0, cond, generator=noise, shape_noise=self.task.shape_noise
        ).mean()

    @torch.no_grad()
    def encode(self, batch: dict, *, caption_dropout: float | None = None):
        """Latents (B, C, h, w) and Condition of a batch, captions dropped out for guidance.

        A style encoder sees each image itself, in training as its own settings say.
        """
        autoencoder, text, *styles = self.frozen
        images, captions, style = batch["images"], batch["captions"], None
        for encoder in styles:
            training = caption_dropout is None
            style = encoder(
                images, self.make_generators(batch, "style", device="cpu"), training=training
            )
            if training:
                shares = rand(
                    len(images), self.make_generators(batch, "style dropout", device="cpu")
                )
                style = style * (shares >= encoder.dropout).to(style)[:, None, None]
                shares = rand(len(images), self.make_generators(batch, "style words", device="cpu"))
                captions = encoder.drop_style_words(captions, shares)
        x0 = autoencoder.encode(images, generator=self.make_generators(batch, "posterior"))
        before = text.truncated
        cond = text(captions)
        self.captions += len(captions)
        self.cut += text.truncated - before
        rate = self.caption_dropout if caption_dropout is None else caption_dropout
        if rate > 0:
            keep = rand(len(x0), self.make_generators(batch, "caption", device="cpu")) >= rate
            cond = cond.where(keep.to(x0.device, non_blocking=True), text.null(len(x0)))
        x0, concat = self.task.training_pair(
            x0, images, autoencoder.encode, generator=self.make_generators(batch, "task")
        )
        return x0, replace(cond, concat=concat, style=style)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        x0, cond = self.encode(batch, caption_dropout=0.0)
        eps = randn(
            x0.shape, self.make_generators(batch, "val noise"), device=x0.device, dtype=x0.dtype
        )
        eps = self.task.shape_noise(eps)
        within = rand(len(x0), self.make_generators(batch, "val time"), device=x0.device)
        for band in range(NUM_LOSS_BANDS):
            t = (band + within) / NUM_LOSS_BANDS
            self._validate(self.ema.module, "", band, x0, cond, t, eps)
            if "loss_raw" in self.val_losses:
                self._validate(self.denoiser, "_raw", band, x0, cond, t, eps)

    def _validate(
        self, net: nn.Module, suffix: str, band: int, x0: Tensor, cond: Condition, t, eps
    ) -> None:
        loss = self.objective.loss_at(net, x0, cond, t=t, eps=eps)
        for name in (f"loss{suffix}", f"loss_t{band}{suffix}"):
            self.val_losses[name].update(loss)

    def on_validation_epoch_end(self) -> None:
        for name, metric in self.val_losses.items():
            self.log(f"val/{name}", metric, prog_bar=name == "loss")

    def make_generators(self, batch: dict, stream: str, *, device=None) -> list[torch.Generator]:
        """One generator an image, for one use."""
        device = self.device if device is None else device
        return make_generators(self.seed, batch["position"], stream=stream, device=device)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer, optimizer_closure=None) -> None:
        # Here and not in a hook after the batch: checkpoints are saved before those.
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        step = self.trainer.global_step + 1
        self.ema.update(self.denoiser, step=step, skipped=self.skipped)
        if self.phema is not None:
            self.phema.update(self.denoiser, step=step)

    def on_fit_start(self) -> None:
        for part in self.frozen:
            part.to(self.device)

    def on_validation_start(self) -> None:
        for part in self.frozen:
            part.to(self.device)

    def on_train_end(self) -> None:
        if self.cut and self.trainer.is_global_zero:
            length = self.frozen[1].max_length
            print(f"{self.cut} of {self.captions} captions were cut to {length} tokens")

    def configure_optimizers(self) -> dict:
        return self.make_optimizer(self.denoiser.parameters(), steps=self.trainer.max_steps)
