"""Layers that draw random numbers in training, which belong to the images of a batch.

Shapes: B images, R rows, B or, where an image has several (frames of a video), a multiple of it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ldm.diffusion.rng import ImageGenerators, make_generators

DrawNumbers = Callable[[ImageGenerators, Sequence[int]], Tensor]  # in a shape (B, ...)


class RandomLayer(nn.Module):
    """A layer whose random numbers are a function of (seed, stream, position of the image).

    Two calls for the same images draw the same numbers. Before `assign_image_positions` is called,
    the numbers come from the global random state.
    """

    def __init__(self) -> None:
        super().__init__()
        self.generators: ImageGenerators | None = None

    def draw(self, like: Tensor, numbers: DrawNumbers, fill: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns random numbers (R, ...), float32, as `like`; fill: where no images are set."""
        if self.generators is None:
            return fill(torch.empty(like.shape, device=like.device))  # contiguous
        images = len(self.generators)
        if len(like) % images:
            raise ValueError(f"{len(like)} rows are no multiple of {images} images")
        drawn = numbers(self.generators, (images, len(like) // images, *like.shape[1:]))
        self.generators.restart()
        return drawn.reshape(like.shape).to(like.device)


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
        mask = self.draw(
            x,
            lambda generators, shape: generators.bernoulli(shape, keep),
            lambda numbers: numbers.bernoulli_(keep),
        )
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
        eps = self.draw(
            x, lambda generators, shape: generators.normal(shape), lambda numbers: numbers.normal_()
        )
        return x + self.std * eps.to(x.dtype)


def find_random_layers(module: nn.Module) -> dict[str, RandomLayer]:
    """Returns the random layers of a module by name."""
    return {n: layer for n, layer in module.named_modules() if isinstance(layer, RandomLayer)}


def assign_image_positions(
    layers: dict[str, RandomLayer],
    seed: int,
    positions: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    rng: str = "philox",
) -> None:
    """Sets the positions of the next batch's images; the name of a layer is its stream."""
    for name, layer in layers.items():
        layer.generators = make_generators(
            seed, positions, stream=f"modules/{name}", device=device, rng=rng
        )
