"""A tiny autoencoder in training."""

from world import small_autoencoder

from ldm.training.modules.autoencoder import AutoencoderTraining
from ldm.training.optimizers import AdamW


def autoencoder_training(*, kl_weight: float = 1e-3) -> AutoencoderTraining:
    optimizer = AdamW(lr=3e-3, warmup=2)
    return AutoencoderTraining(small_autoencoder(), optimizer=optimizer, kl_weight=kl_weight)
