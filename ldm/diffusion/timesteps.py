"""Timesteps of training: quantile functions give t in (0, 1] of uniform numbers, one per image."""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from ldm.diffusion.rng import Generators, ImageGenerators, derive_seed, rand

TimestepSampler = Callable[[int, Generators], Tensor]  # B, one generator per image -> t (B,)

SPREADS = ("independent", "stratified", "sobol")
FRACTION_BITS = 53  # of a float64
TREE_LEVELS = 8  # per digest: 255 nodes of a binary tree in its 512 bits


@dataclass(frozen=True, kw_only=True)
class Uniforms:
    """One number in [0, 1) per image, each with uniform distribution, spread over a batch.

    spread: `independent`; `stratified`, the `batch` images of an optimizer step, on all devices
    together, have one of `batch` equal intervals each; `sobol`, image i has the i-th number of a
    low-discrepancy sequence (Sobol 1967, the bits of i mirrored), scrambled by the seed (Owen
    1995), so that any 2^k positions from a multiple of 2^k on have one of 2^k equal intervals each.
    """

    spread: str = "independent"
    batch: int | None = None

    def __post_init__(self) -> None:
        if self.spread not in SPREADS:
            raise ValueError(
                f"timestep_sampler.spread '{self.spread}' is none of {', '.join(SPREADS)}"
            )
        if self.spread == "stratified" and (self.batch is None or self.batch < 1):
            raise ValueError(
                "timestep_sampler.spread=stratified needs the images of an optimizer step, "
                f"got {self.batch}"
            )

    def __call__(self, n: int, generator: Generators) -> Tensor:
        if self.spread == "independent":
            return rand(n, generator)
        if not isinstance(generator, ImageGenerators):
            raise ValueError(
                f"timestep_sampler.spread={self.spread} needs to know which images these are: give "
                "it the generators of ldm.diffusion.rng.make_generators"
            )
        if len(generator) != n:
            raise ValueError(f"{len(generator)} generators for a batch of {n} images")
        if self.spread == "sobol":
            key = f"{generator.seed}/{generator.stream}/sobol"
            integers = [owen_scramble(position, key=key) for position in generator.positions]
            return torch.tensor(integers, dtype=torch.float64) / 2**FRACTION_BITS
        return (self._strata(generator) + rand(n, generator)) / self.batch

    def _strata(self, generator: ImageGenerators) -> Tensor:
        # A new order for each step: no place in a batch, and no rank, always has the same interval.
        places = [divmod(position, self.batch) for position in generator.positions]
        stream, orders = f"{generator.stream}/strata", {}
        for step in {step for step, _ in places}:
            own = torch.Generator().manual_seed(derive_seed(generator.seed, step, stream=stream))
            orders[step] = torch.randperm(self.batch, generator=own)
        return torch.stack([orders[step][place] for step, place in places])


def owen_scramble(position: int, *, key: str) -> int:
    """The lowest FRACTION_BITS bits of `position`, mirrored and scrambled.

    A bit is flipped at random, but alike for all positions with the same lower bits (Owen 1995).
    """
    mirrored = 0
    for first in range(0, FRACTION_BITS, TREE_LEVELS):
        shared = position % 2**first
        choices = int.from_bytes(blake2b(f"{key}/{first}/{shared}".encode()).digest(), "big")
        for level in range(first, min(first + TREE_LEVELS, FRACTION_BITS)):
            depth = level - first
            node = 2**depth + (position >> first) % 2**depth  # of a binary tree with root 1
            flipped = (position >> level ^ choices >> node) & 1
            mirrored = 2 * mirrored + flipped
    return mirrored


def apply_elementwise(quantile: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """`quantile` of each number (B,), by itself on the CPU."""
    # Vector instructions round differently from those that do the rest of a batch: the last digit
    # of t would depend on an image's place in the batch.
    return torch.stack([quantile(each) for each in u]) if u.device.type == "cpu" else quantile(u)


@dataclass(frozen=True)
class PowerTimestepSampler(Uniforms):
    """t in [0, 1) with density proportional to t^(power - 1); 1 is uniform (Ho et al. 2020)."""

    power: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.power <= 0:
            raise ValueError(f"time_power must be above 0, got {self.power}")

    def __call__(self, n: int, generator: Generators) -> Tensor:
        u = super().__call__(n, generator)
        return apply_elementwise(lambda u: u ** (1 / self.power), u)


@dataclass(frozen=True)
class LogitNormalTimestepSampler(Uniforms):
    """t in (0, 1) whose log(t / (1 - t)) is normal (Esser et al. 2024, arXiv:2403.03206, 3.1)."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.std <= 0:
            raise ValueError(f"timestep_sampler.std must be above 0, got {self.std}")

    def __call__(self, n: int, generator: Generators) -> Tensor:
        def quantile(u: Tensor) -> Tensor:
            return (self.mean + self.std * torch.special.ndtri(u)).sigmoid()

        return apply_elementwise(quantile, super().__call__(n, generator))
