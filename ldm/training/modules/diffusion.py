"""The training of the denoiser on latents: encoders, caption dropout, loss and EMA.

Shapes: B batch, C latent channels, H W pixels, h w latent grid.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from ldm.diffusion.conditioning import Condition
from ldm.diffusion.rng import rand, randn
from ldm.inference.components import Components
from ldm.models.kernels import cache_casts
from ldm.training.ema import EMA
from ldm.training.optimizers import NetworkParameters
from ldm.training.power_ema import PowerEMA
from ldm.training.randomness import make_batch_generators
from ldm.training.step_clock import StepClock, count_forward_flops
from ldm.utils.transfer import send

NUM_LOSS_BANDS = 8  # val/loss_t0 .. t7: equal parts of t


class LatentDiffusion(L.LightningModule):
    """Trains the denoiser and its averages; autoencoder, text and style encoder stay frozen.

    `components` is a plain dataclass, so that the frozen modules are neither saved nor wrapped.
    Random numbers of an image depend on (seed, position of the image in the run) alone.
    posterior: latents are a sample of the autoencoder's posterior, or its mean.
    """

    clock: StepClock | None = None  # set by ThroughputMonitor
    skipped: Tensor | None = None  # set by NonFiniteStepSkipper: 1.0 where this step is left out

    def __init__(
        self,
        components: Components,
        *,
        optimizer,
        ema_decay: float = 0.9999,
        phema_lengths: Sequence[float] = (),
        caption_dropout: float = 0.1,
        validate_raw: bool = False,
        posterior: Literal["sample", "mean"] = "sample",
        seed: int = 0,
        rng: str = "philox",
    ) -> None:
        super().__init__()
        self.components = components
        components.autoencoder.eval().requires_grad_(False)
        self.denoiser = components.denoiser
        self.ema = EMA(self.denoiser, decay=ema_decay)
        self.phema = PowerEMA(self.denoiser, lengths=phema_lengths) if phema_lengths else None
        self.objective = components.objective
        self.make_optimizer = optimizer
        self.caption_dropout, self.posterior = caption_dropout, posterior
        self.seed, self.rng = seed, rng
        self.captions = self.cut = 0  # captions of the data so far, and those that were cut
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
        if self.clock is not None:
            self.clock.mark("encoders")
        noise = make_batch_generators(self, batch, "noise")
        shape_noise = self.components.task.shape_noise
        return self.objective.loss(
            self.denoiser, x0, cond, generator=noise, shape_noise=shape_noise
        ).mean()

    @torch.no_grad()
    def count_flops(self, batch: dict) -> int:
        """Returns the FLOPs of a training step on a batch, without optimizer and averages.

        A backward pass is counted as twice its forward pass, and as once where weights are frozen;
        with checkpointing, it is still that.
        """
        from torch.utils.flop_counter import FlopCounterMode  # imports the compiler

        captions = self.captions, self.cut
        context = self.trainer.precision_plugin.forward_context()
        with context, FlopCounterMode(display=False) as encoders:
            x0, cond = self.encode(batch)
        self.captions, self.cut = captions
        t = torch.zeros(len(x0), device=x0.device)
        passes = 3 if all(weight.requires_grad for weight in self.denoiser.parameters()) else 2
        forward = count_forward_flops(self.ema.module, x0, t, cond)
        return encoders.get_total_flops() + passes * forward

    @torch.no_grad()
    def encode(self, batch: dict, *, training: bool = True) -> tuple[Tensor, Condition]:
        """Returns target latents (B, C, h, w) and Condition; training: with dropped conditions.

        batch: of images or, from a cache, of moments and text states.
        """
        generators = None  # the mean of the posterior
        if self.posterior == "sample":
            generators = make_batch_generators(self, batch, "posterior")
        autoencoder, sizes = self.components.autoencoder, batch.get("sizes")
        if sizes is not None:
            sizes = send(sizes, self.device)
        if "moments" in batch:
            x0 = autoencoder.encode_moments(*batch["moments"], generator=generators)
            cond = Condition(**batch["condition"])
            cond = self.drop_conditions(batch, cond) if training else cond
            return x0, replace(cond, sizes=sizes)
        style, captions = self.encode_style(batch, training=training)
        x0 = autoencoder.encode(batch["images"], generator=generators)
        cond = self.encode_text(captions)
        if training:
            cond = self.drop_conditions(batch, cond)
        generators = make_batch_generators(self, batch, "task")
        x0, concat = self.components.task.training_pair(
            x0, batch["images"], autoencoder.encode, generator=generators
        )
        return x0, replace(cond, style=style, concat=concat, sizes=sizes)

    def encode_text(self, captions: Sequence[str]) -> Condition:
        """Returns the Condition of captions; counts those that are cut."""
        text_encoder = self.components.text_encoder
        before = text_encoder.truncated
        cond = text_encoder(captions)
        self.captions += len(captions)
        self.cut += text_encoder.truncated - before
        return cond

    def encode_style(self, batch: dict, *, training: bool) -> tuple[Tensor | None, Sequence[str]]:
        """Returns style features (B, N, F) of the images, and the captions that go with them.

        In training some images have no style, and some captions lose their words about style.
        """
        encoder, captions = self.components.style_encoder, batch["captions"]
        if encoder is None:
            return None, captions
        generators = make_batch_generators(self, batch, "style", device="cpu")
        style = encoder(batch["images"], generators, training=training)
        if training:
            has_style = self.draw_shares(batch, "style dropout") >= encoder.dropout
            style = style * send(has_style, style.device)[:, None, None]
            captions = encoder.drop_style_words(captions, self.draw_shares(batch, "style words"))
        return style, captions

    def drop_conditions(self, batch: dict, cond: Condition) -> Condition:
        """Returns the condition with a share `caption_dropout` of empty captions, for guidance."""
        if self.caption_dropout <= 0:
            return cond
        keep = self.draw_shares(batch, "caption") >= self.caption_dropout
        null = self.components.text_encoder.null(len(keep))
        return cond.where(send(keep, self.device), null)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        x0, cond = self.encode(batch, training=False)
        noise = make_batch_generators(self, batch, "val noise")
        eps = randn(x0.shape, noise, device=x0.device, dtype=x0.dtype)
        eps = self.components.task.shape_noise(eps)
        within = rand(len(x0), make_batch_generators(self, batch, "val time"), device=x0.device)
        for band in range(NUM_LOSS_BANDS):
            t = (band + within) / NUM_LOSS_BANDS
            with cache_casts(self.ema.module):
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

    def draw_shares(self, batch: dict, stream: str) -> Tensor:
        """Returns one uniform number (B,) per image, on the CPU."""
        return rand(
            len(batch["position"]), make_batch_generators(self, batch, stream, device="cpu")
        )

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer, optimizer_closure=None) -> None:
        # Here and not in a hook after the batch: checkpoints are saved before those.
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        step = self.trainer.global_step + 1
        self.ema.update(self.denoiser, step=step, skipped=self.skipped)
        if self.phema is not None:
            self.phema.update(self.denoiser, step=step)

    def on_fit_start(self) -> None:
        for module in self.components.frozen.values():
            module.to(self.device)

    on_validation_start = on_fit_start

    def on_train_end(self) -> None:
        if self.cut and self.trainer.is_global_zero:
            length = self.components.text_encoder.max_length
            print(f"{self.cut} of {self.captions} captions were cut to {length} tokens")

    def configure_optimizers(self) -> dict:
        return self.make_optimizer(NetworkParameters(self.denoiser), steps=self.trainer.max_steps)
