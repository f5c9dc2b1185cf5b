"""A tiny noisy classifier in training."""

import torch

from ldm.diffusion.schedules import cosine
from ldm.models.autoencoder import IdentityAutoencoder
from ldm.models.noisy_classifier import NoisyClassifier, NoisyTower
from ldm.models.text.labels import LabelTextEncoder
from ldm.training.modules.classifier import ClassifierTraining
from ldm.training.optimizers import AdamW

COLOURS = ["red", "lime", "blue", "white", "magenta"]


SIZES = {"width": 16, "channels": 16, "heads": 2, "groups": 4}


def training(text=None, *, autoencoder=None, lr=3e-3, seed=0) -> ClassifierTraining:
    """In pixel space, unless there is an autoencoder; always the same weights."""
    torch.manual_seed(0)
    tower = NoisyTower(schedule=cosine(), in_channels=3, **SIZES)
    classifier = NoisyClassifier(tower, text or LabelTextEncoder(COLOURS))
    optimizer = AdamW(lr=lr, warmup=2)
    return ClassifierTraining(
        classifier, autoencoder or IdentityAutoencoder(), optimizer=optimizer, seed=seed
    )
