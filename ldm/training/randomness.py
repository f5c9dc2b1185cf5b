"""The random numbers of a training step: those of its images, for one use."""

from collections.abc import Mapping
from typing import Protocol

import torch

from ldm.diffusion.rng import ImageGenerators, make_generators


class SeededTraining(Protocol):
    """What the random numbers of a training depend on."""

    seed: int
    rng: str
    device: torch.device


def make_batch_generators(
    training: SeededTraining,
    batch: Mapping,
    stream: str,
    *,
    device: torch.device | str | None = None,
) -> ImageGenerators:
    """Returns the generators of a batch's images for one stream; device=None: the training's."""
    return make_generators(
        training.seed,
        batch["position"],
        stream=stream,
        device=training.device if device is None else device,
        rng=training.rng,
    )
