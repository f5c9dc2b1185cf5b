"""Pooled text states with unit variance in every direction.

Shapes: n captions, P pooled width.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WHITENING_FILE = "whitening.safetensors"
VARIANCE_FLOOR = 0.02  # of the mean variance: what varies less is not blown up any further


class Whitening(nn.Module):
    """states -> (states - mean) @ matrix, whose covariance over captions is about the identity.

    What a contrastive text encoder says of a colour in one place may vary a thousand times less
    than what it says of the background, and a denoiser would learn it as much later. Autoencoders'
    latents are scaled for the same reason.
    """

    def __init__(self, mean: Tensor, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("matrix", matrix)

    @classmethod
    def from_states(cls, states: Tensor) -> "Whitening":
        """The whitening (P,), (P, P) of the states (n, P) of a sample of captions."""
        mean = states.mean(0)
        centred = (states - mean).double()
        variance, directions = torch.linalg.eigh(centred.T @ centred / len(states))
        variance = variance.clamp(min=0) + VARIANCE_FLOOR * variance.mean().clamp(min=1e-8)
        return cls(mean, (directions / variance.sqrt()).float())

    def save(self, folder: Path) -> None:
        """Write FILE into a folder that is there."""
        save_file(
            {name: part.contiguous() for name, part in self.state_dict().items()},
            folder / WHITENING_FILE,
        )

    @classmethod
    def load(cls, folder: Path, *, width: int) -> "Whitening":
        """FILE out of a folder.

        Raises OSError where it cannot be read, ValueError where it is for states of another width.
        """
        try:
            parts = load_file(folder / WHITENING_FILE)
        except SafetensorError as error:
            raise OSError(f"{folder / WHITENING_FILE} cannot be read: {error}") from error
        shapes = {name: tuple(part.shape) for name, part in parts.items()}
        if shapes != {"mean": (width,), "matrix": (width, width)}:
            raise ValueError(
                f"{folder / WHITENING_FILE} is not for states {width} wide: it has {shapes}"
            )
        return cls(parts["mean"].float(), parts["matrix"].float())

    def forward(self, states: Tensor) -> Tensor:
        """(n, P) -> (n, P)."""
        return (states - self.mean) @ self.matrix
