"""Random numbers that belong to an image, not to a batch, a rank or a process.

A draw is a pure function of (seed, stream, position), where `position` counts the images of a run
from its start, so that nothing has to be saved. Shapes: B images.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache, partial
from hashlib import blake2b

import torch
from torch import Tensor

from ldm.diffusion.philox import (
    compute_philox_words,
    draw_philox_words,
    make_normal_table,
    make_philox_round_keys,
    normal_from_philox_words,
)
from ldm.utils.transfer import send

MAX_HOST_WORDS = 2**19  # of a draw for a GPU: more are drawn on the GPU
_DOUBLE_BITS = 53


@dataclass(eq=False, repr=False)
class ImageGenerators(ABC):
    """The random numbers of a batch's images for one use.

    Each method draws fresh numbers for the images, the first dimension of `shape`.
    """

    seed: int
    positions: Iterable[int]
    _: KW_ONLY
    stream: str
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        self.positions, self.device = tuple(self.positions), torch.device(self.device)

    def __len__(self) -> int:
        return len(self.positions)

    @abstractmethod
    def share(self, rows: int) -> "Generators":
        """Generators of `rows` rows, such as a video's frames, for each image."""

    @abstractmethod
    def restart(self) -> None:
        """Lets the next draws be the first ones again."""

    @abstractmethod
    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers, float32."""

    @abstractmethod
    def uniform(self, shape: Sequence[int], *, device: torch.device | str | None = None) -> Tensor:
        """Uniform numbers in [0, 1), float64; device: of the result, None: of the generators."""

    @abstractmethod
    def bernoulli(self, shape: Sequence[int], probability: float) -> Tensor:
        """Ones with this probability, and zeros, float32."""

    @abstractmethod
    def permutation(self, n: int) -> Tensor:
        """A random order of 0 .. n - 1 for each image, (B, n)."""


Generators = ImageGenerators | torch.Generator | Sequence[torch.Generator] | None


class TorchGenerators(ImageGenerators):
    """One generator of torch per image; a CPU and a GPU draw different numbers."""

    _generators: Sequence[torch.Generator] | None = None

    @property
    def generators(self) -> Sequence[torch.Generator]:
        """The generators, made when they are first needed."""
        if self._generators is None:
            seeds = [derive_seed(self.seed, each, stream=self.stream) for each in self.positions]
            self._generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        return self._generators

    def share(self, rows: int) -> "Generators":
        return share_generators(self.generators, rows)

    def restart(self) -> None:
        self._generators = None

    def normal(self, shape: Sequence[int]) -> Tensor:
        return _draw_by_torch(torch.randn, shape, self.generators)

    def uniform(self, shape: Sequence[int], *, device: torch.device | str | None = None) -> Tensor:
        return _draw_by_torch(_rand_double, shape, self.generators).to(device or self.device)

    def bernoulli(self, shape: Sequence[int], probability: float) -> Tensor:
        numbers = torch.empty(tuple(shape), device=self.device)
        for rows, generator in zip(numbers, self.generators, strict=True):
            rows.bernoulli_(probability, generator=generator)
        return numbers

    def permutation(self, n: int) -> Tensor:
        return randperm(n, self.generators, device=self.device)


class PhiloxGenerators(ImageGenerators):
    """One counter-based generator for all images: a call draws a batch, the same on any device."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.key = derive_philox_key(self.seed, self.stream)
        self.draws, self.rows = 0, 1
        # On the device before a graph is compiled or captured.
        self.indices = send_positions(self.positions, self.device)
        self.round_keys = make_philox_round_keys(self.key, self.device)
        self.table = make_normal_table(self.device)

    def __len__(self) -> int:
        return len(self.positions) * self.rows

    def share(self, rows: int) -> "Generators":
        stream = f"{self.stream}/rows"
        shared = PhiloxGenerators(self.seed, self.positions, stream=stream, device=self.device)
        shared.rows = rows
        return shared

    def restart(self) -> None:
        self.draws = 0

    def normal(self, shape: Sequence[int]) -> Tensor:
        size = math.prod(shape) // len(self.positions)
        words = self._draw((size + 1) // 2)
        return normal_from_philox_words(words, self.table)[:, :size].reshape(tuple(shape))

    def uniform(self, shape: Sequence[int], *, device: torch.device | str | None = None) -> Tensor:
        size = math.prod(shape) // len(self.positions)
        words = self._draw(size, device)[:, :size].reshape(tuple(shape))
        integers = words >> (64 - _DOUBLE_BITS) & (2**_DOUBLE_BITS - 1)
        return integers.double().mul_(2**-_DOUBLE_BITS)

    def bernoulli(self, shape: Sequence[int], probability: float) -> Tensor:
        size = math.prod(shape) // len(self.positions)
        halves = self._draw((size + 1) // 2).view(torch.int32)[:, :size].reshape(tuple(shape))
        return (halves < min(round(probability * 2**32), 2**32 - 1) - 2**31).float()

    def permutation(self, n: int) -> Tensor:
        return self.uniform((len(self), n)).argsort(dim=1)

    def _draw(self, words: int, device: torch.device | str | None = None) -> Tensor:
        """Words (B, `words` or more), int64, of the next draw, on `device`."""
        device = self.device if device is None else torch.device(device)
        draw, self.draws = self.draws, self.draws + 1
        by_tensors = torch.compiler.is_compiling()
        if device.type == "cuda" and not by_tensors:
            is_large = len(self.positions) * words > MAX_HOST_WORDS
            by_tensors = is_large or torch.cuda.is_current_stream_capturing()
        if by_tensors:
            how = {"round_keys": self.round_keys, "draw": draw}
            return compute_philox_words(self.indices, words, **how).to(device)
        # On the host: numbers that stay there, such as timesteps, do not wait for a GPU.
        return send(draw_philox_words(self.positions, words, key=self.key, draw=draw), device)


RNGS = {"philox": PhiloxGenerators, "torch": TorchGenerators}


def make_generators(
    seed: int,
    positions: Iterable[int],
    *,
    stream: str,
    device: torch.device | str = "cpu",
    rng: str = "philox",
) -> ImageGenerators:
    """The generators of a batch's images; `stream` names the use, as no two share their numbers.

    rng: `philox`, or `torch` for the numbers of former runs.
    """
    return RNGS[rng](seed, positions, stream=stream, device=device)


def derive_generators(generator: Generators, stream: str) -> Generators:
    """Generators of the same images for another use; those without positions as they are."""
    if not isinstance(generator, ImageGenerators):
        return generator
    stream = f"{generator.stream}/{stream}"
    return type(generator)(
        generator.seed, generator.positions, stream=stream, device=generator.device
    )


def share_generators(generator: Generators, rows: int) -> Generators:
    """Generators of `rows` rows for each image; a single generator as it is."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    if isinstance(generator, ImageGenerators):
        return generator.share(rows)
    return [own for own in generator for _ in range(rows)]


def make_sampling_generators(
    seeds: Sequence[int], *, stream: str, device: torch.device | str = "cpu", rng: str = "philox"
) -> Generators:
    """The generators of images that are sampled, by the seed of each."""
    if rng == "torch":
        return [torch.Generator(device).manual_seed(seed) for seed in seeds]
    return make_generators(0, seeds, stream=f"sampling/{stream}", device=device, rng=rng)


def derive_seed(seed: int, position: int, *, stream: str) -> int:
    """A seed below 2^63 that depends on all three."""
    digest = blake2b(f"{seed}/{stream}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@lru_cache(256)
def derive_philox_key(seed: int, stream: str) -> int:
    """A key below 2^128 that depends on both."""
    return int.from_bytes(blake2b(f"{seed}/{stream}".encode(), digest_size=16).digest(), "big")


@lru_cache(16)
def send_positions(positions: tuple[int, ...], device: torch.device) -> Tensor:
    """Positions (B,) on a device, sent once for all streams of a step."""
    return send(torch.tensor(positions, dtype=torch.int64), device)


def randn(
    shape: Sequence[int],
    generator: Generators,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal numbers from one generator, or from those of the batch's images."""
    if isinstance(generator, ImageGenerators):
        _check_batch(generator, shape)
        numbers = generator.normal(shape)
    else:
        numbers = _draw_by_torch(torch.randn, shape, generator)
    # Contiguous, and only then converted: a channels_last draw would give other numbers.
    return numbers.to(device=device, dtype=dtype)


def rand(
    shape: int | Sequence[int], generator: Generators, *, device: torch.device | str = "cpu"
) -> Tensor:
    """Uniform numbers in [0, 1), in float64; otherwise as `randn`."""
    shape = (shape,) if isinstance(shape, int) else shape
    if isinstance(generator, ImageGenerators):
        _check_batch(generator, shape)
        return generator.uniform(shape, device=device)
    return _draw_by_torch(_rand_double, shape, generator).to(device)


def randperm(
    n: int,
    generator: ImageGenerators | Sequence[torch.Generator],
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A random order of 0 .. n - 1 for each image, (B, n)."""
    if isinstance(generator, ImageGenerators):
        return send(generator.permutation(n), device)
    orders = [torch.randperm(n, generator=own, device=own.device) for own in generator]
    return send(torch.stack(orders), device)


_rand_double = partial(torch.rand, dtype=torch.float64)


def _draw_by_torch(
    fn: Callable[..., Tensor],
    shape: Sequence[int],
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> Tensor:
    if generator is None:
        return fn(tuple(shape))
    if isinstance(generator, torch.Generator):
        return fn(tuple(shape), generator=generator, device=generator.device)
    _check_batch(generator, shape)
    return torch.stack([fn(tuple(shape[1:]), generator=g, device=g.device) for g in generator])


def _check_batch(generator: Sized, shape: Sequence[int]) -> None:
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for a batch of {shape[0]} images")


class ImageNoise:
    """Fresh noise at every call, from one seed per image: an image does not depend on its batch.

    A tensor (B, ...) gives standard normal noise of its shape, type and device. rng: as in
    `make_generators`.
    """

    def __init__(
        self, seeds: Sequence[int], *, device: torch.device | str = "cpu", rng: str = "philox"
    ) -> None:
        self.generators = make_sampling_generators(seeds, stream="noise", device=device, rng=rng)

    def __call__(self, x: Tensor) -> Tensor:
        return randn(x.shape, self.generators, device=x.device, dtype=x.dtype)
