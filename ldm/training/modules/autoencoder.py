"""Training of the autoencoder: absolute error plus a small KL term.

Shapes: B batch, C latent channels, H W pixels, h w latent grid.
"""

import lightning as L
import torch
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.functional.image import peak_signal_noise_ratio

from ldm.models.autoencoder import AutoencoderKL, sample_posterior
from ldm.training.optimizers import NetworkParameters
from ldm.training.randomness import make_batch_generators


class AutoencoderTraining(L.LightningModule):
    """L1 + kl_weight KL (Rombach et al. 2022, appendix G, without its discriminator).

    Each validation also measures the latents' mean and standard deviation for each channel, and
    stores them in the autoencoder, which then encodes to unit variance.
    """

    def __init__(
        self,
        autoencoder: AutoencoderKL,
        *,
        optimizer,
        kl_weight: float = 1e-6,
        seed: int = 0,
        rng: str = "philox",
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.make_optimizer = optimizer
        self.kl_weight = kl_weight
        self.seed, self.rng = seed, rng
        how = {"nan_strategy": "disable"}  # the default drops NaN
        self.val_loss, self.val_psnr = MeanMetric(**how), MeanMetric(**how)
        self.moments: Tensor | None = None  # (3, C): count, sum and sum of squares

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        loss, _, _ = self.reconstruct(batch)
        return loss.mean()

    def reconstruct(self, batch: dict) -> tuple[Tensor, Tensor, Tensor]:
        """Returns loss (B,), reconstructions (B, 3, H, W) and unscaled latents z (B, C, h, w)."""
        images = batch["images"]
        generators = make_batch_generators(self, batch, "posterior")
        mean, logvar = self.autoencoder.posterior(images)  # (B, C, h, w)
        z = sample_posterior(mean, logvar, generator=generators)
        restored = self.autoencoder.decode_unscaled(z)  # (B, 3, H, W)
        l1 = (restored - images).abs().flatten(1).mean(1)
        # To N(0, 1), per latent element, so kl_weight means the same at any size.
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).mean(1)
        return l1 + self.kl_weight * kl, restored, z

    def on_validation_epoch_start(self) -> None:
        channels = self.autoencoder.channels
        self.moments = torch.zeros(3, channels, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        loss, restored, z = self.reconstruct(batch)
        self.val_loss.update(loss)
        psnr = peak_signal_noise_ratio(
            restored.clamp(-1, 1), batch["images"], data_range=2.0, reduction="none", dim=(1, 2, 3)
        )
        self.val_psnr.update(psnr)
        z = z.double().transpose(0, 1).flatten(1)  # (C, B h w)
        count = torch.full_like(z[:, 0], z.shape[1])
        self.moments += torch.stack([count, z.sum(1), z.square().sum(1)])

    def on_validation_epoch_end(self) -> None:
        self.log("val/loss", self.val_loss, prog_bar=True)
        self.log("val/psnr", self.val_psnr, prog_bar=True)
        count, total, squares = self.trainer.strategy.reduce(self.moments, reduce_op="sum")
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=1e-12).sqrt()
        self.autoencoder.set_scale(mean.float(), 1 / std.float())

    def configure_optimizers(self) -> dict:
        return self.make_optimizer(
            NetworkParameters(self.autoencoder), steps=self.trainer.max_steps
        )
