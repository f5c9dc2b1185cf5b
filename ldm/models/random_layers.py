"""Layers that draw random numbers in training, from one generator per image.

Shapes: B images, R rows, B or, where an image has several (frames of a video), a multiple of it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ldm.diffusion.rng import make_generators

RandomFill = Callable[[Tensor, torch.Generator | None], object]  # writes into a tensor


class RandomLayer(nn.Module):
    """A layer whose random numbers are a function of (seed, stream, position of the image).

    Two calls for the same images draw the same numbers. Before `assign_image_positions` is called,
    the numbers come from the global random state.
    """

    def __init__(self) -> None:
        super().__init__()
        self.images: tuple[int, Sequence[int], str] | None = None  # seed, positions, stream

    def draw(self, like: Tensor, fill: RandomFill) -> Tensor:
        """Returns random numbers (R, ...), float32, in the shape of `like`."""
        numbers = torch.empty(like.shape, device=like.device)  # contiguous, whatever `like` is
        if self.images is None:
            fill(numbers, None)
            return numbers
        seed, positions, stream = self.images
        if len(like) % len(positions):
            raise ValueError(f"{len(like)} rows are no multiple of {len(positions)} images")
        generators = make_generators(seed, positions, stream=stream, device=like.device)
        for rows, generator in zip(numbers.chunk(len(positions)), generators, strict=True):
            fill(rows, generator)
        return numbers


class Dropout(RandomLayer):
    """In training, zeros with probability `p`; the rest is divided by 1 - p (Srivastava 2014)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout={p} is a share from 0 to below 1")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """x (R, ...) -> as x."""
        if not self.training or self.p == 0:
            return x
        keep = 1 - self.p
        mask = self.draw(x, lambda rows, generator: rows.bernoulli_(keep, generator=generator))
        return x * mask.div_(keep).to(x.dtype)


class GaussianNoise(RandomLayer):
    """In training, adds normal noise of standard deviation `std`."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std

    def forward(self, x: Tensor) -> Tensor:
        """x (R, ...) -> as x."""
        if not self.training:
            return x
        eps = self.draw(x, lambda rows, generator: rows.normal_(generator=generator))
        return x + self.std * eps.to(x.dtype)


def find_random_layers(module: nn.Module) -> dict[str, RandomLayer]:
    """Returns the random layers of a module by name."""
    return {n: layer for n, layer in module.named_modules() if isinstance(layer, RandomLayer)}


def assign_image_positions(
    layers: dict[str, RandomLayer], seed: int, positions: Sequence[int]
) -> None:
    """Sets the positions of the next batch's images; the name of a layer is its stream."""
    for name, layer in layers.items():
        layer.images = (seed, tuple(positions), f"modules/{name}")
