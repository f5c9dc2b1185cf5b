"""Pooled text states (n, P) of n captions with unit variance in every direction."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WHITENING_FILE = "whitening.safetensors"
VARIANCE_FLOOR = 0.02  # of the mean variance, which is added to all variances


class Whitening(nn.Module):
    """states -> (states - mean) @ matrix, whose covariance over captions is about the identity.

    In a contrastive text encoder's states a small object's colour may vary a thousand times less
    than the background's, and a denoiser would learn it as much later.
    """

    def __init__(self, mean: Tensor, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("matrix", matrix)

    @classmethod
    def from_states(cls, states: Tensor) -> "Whitening":
        """Returns the whitening of the states (n, P) of a sample of captions."""
        mean = states.mean(0)
        centred = (states - mean).double()
        variance, directions = torch.linalg.eigh(centred.T @ centred / len(states))
        variance = variance.clamp(min=0) + VARIANCE_FLOOR * variance.mean().clamp(min=1e-8)
        return cls(mean, (directions / variance.sqrt()).float())

    def save(self, folder: Path) -> None:
        """Writes `WHITENING_FILE` into an existing folder."""
        tensors = {name: part.contiguous() for name, part in self.state_dict().items()}
        save_file(tensors, folder / WHITENING_FILE)

    @classmethod
    def load(cls, folder: Path, *, width: int) -> "Whitening":
        """Reads `WHITENING_FILE` from a folder.

        Raises OSError where it cannot be read, and ValueError where the width differs.
        """
        file = folder / WHITENING_FILE
        try:
            parts = load_file(file)
        except SafetensorError as error:
            raise OSError(f"{file} cannot be read: {error}") from error
        shapes = {name: tuple(part.shape) for name, part in parts.items()}
        if shapes != {"mean": (width,), "matrix": (width, width)}:
            raise ValueError(f"{file} is not for states {width} wide: it has {shapes}")
        return cls(parts["mean"].float(), parts["matrix"].float())

    def forward(self, states: Tensor) -> Tensor:
        """(n, P) -> (n, P)."""
        return (states - self.mean) @ self.matrix
