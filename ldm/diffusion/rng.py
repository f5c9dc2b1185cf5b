"""Random numbers that belong to an image, not to a batch, a rank or a process.

A draw is a pure function of (seed, stream, position), where `position` counts the images of a run
from its start, so that nothing has to be saved.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from hashlib import blake2b

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None


class ImageGenerators(list[torch.Generator]):
    """One generator per image, for one use, which knows the images' positions."""

    def __init__(
        self, seed: int, positions: Iterable[int], *, stream: str, device: torch.device | str
    ) -> None:
        self.seed, self.positions, self.stream = seed, tuple(positions), stream
        self.device = device
        seeds = [derive_seed(seed, position, stream=stream) for position in self.positions]
        super().__init__(torch.Generator(device).manual_seed(each) for each in seeds)


def make_generators(
    seed: int, positions: Iterable[int], *, stream: str, device: torch.device | str = "cpu"
) -> ImageGenerators:
    """One generator per image; `stream` names the use, as no two uses share their numbers."""
    return ImageGenerators(seed, positions, stream=stream, device=device)


def derive_generators(generator: Generators, stream: str) -> Generators:
    """Generators of the same images for another use; those without positions as they are."""
    if not isinstance(generator, ImageGenerators):
        return generator
    stream = f"{generator.stream}/{stream}"
    return make_generators(
        generator.seed, generator.positions, stream=stream, device=generator.device
    )


def derive_seed(seed: int, position: int, *, stream: str) -> int:
    """A seed below 2^63 that depends on all three."""
    digest = blake2b(f"{seed}/{stream}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def randn(
    shape: Sequence[int],
    generator: Generators,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal numbers from one generator, or from one per image of the batch."""
    # Contiguous, and only then converted: a channels_last draw would give other numbers.
    return _draw(torch.randn, shape, generator).to(device=device, dtype=dtype)


def rand(
    shape: int | Sequence[int], generator: Generators, *, device: torch.device | str = "cpu"
) -> Tensor:
    """Uniform numbers in [0, 1), in float64; otherwise as `randn`."""
    shape = (shape,) if isinstance(shape, int) else shape
    return _draw(partial(torch.rand, dtype=torch.float64), shape, generator).to(device)


def _draw(fn, shape: Sequence[int], generator: Generators) -> Tensor:
    if generator is None:
        return fn(tuple(shape))
    if isinstance(generator, torch.Generator):
        return fn(tuple(shape), generator=generator, device=generator.device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for a batch of {shape[0]} images")
    return torch.stack([fn(tuple(shape[1:]), generator=g, device=g.device) for g in generator])


class ImageNoise:
    """Fresh noise at every call, from one seed per image: an image does not depend on its batch.

    A tensor (B, ...) gives standard normal noise of its shape, type and device.
    """

    def __init__(self, seeds: Sequence[int], *, device: torch.device | str = "cpu") -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, x: Tensor) -> Tensor:
        return randn(x.shape, self.generators, device=x.device, dtype=x.dtype)
