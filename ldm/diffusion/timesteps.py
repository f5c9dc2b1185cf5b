"""Timesteps of training: at which t in (0, 1] the images of a batch are trained.

A distribution gives t as a function of a uniform number u, its quantile function; `Uniforms` draws
the u of each image. Every t depends on the run's seed and the image's position alone.
"""

from collections.abc import Callable
from hashlib import blake2b

import torch
from torch import Tensor

from ldm.diffusion.rng import Generators, ImageGenerators, derive_seed, rand

TimestepSampler = Callable[[int, Generators], Tensor]  # B, one generator per image -> t (B,)

SPREADS = ("independent", "stratified", "sobol")
FRACTION_BITS = 53  # of a float64
TREE_LEVELS = 8  # per digest: 255 nodes of a binary tree in its 512 bits


class Uniforms:
    """One number in [0, 1) per image, each with uniform distribution, spread over a batch.

    `independent`: no spread. `stratified`: the `batch` images of an optimizer step, on all devices
    together, have one of `batch` equal intervals each, in a new random order at each step.
    `sobol`: image i has the i-th number of a low-discrepancy sequence (Sobol 1967, whose first
    dimension is van der Corput's: the bits of i, mirrored), scrambled by the seed (Owen 1995). Any
    2^k positions from a multiple of 2^k on have one of 2^k equal intervals each: also the steps of
    a run complement one another.
    """

    def __init__(self, *, spread: str = "independent", batch: int | None = None) -> None:
        if spread not in SPREADS:
            raise ValueError(f"timestep_sampler.spread '{spread}' is none of {', '.join(SPREADS)}")
        if spread == "stratified" and (batch is None or batch < 1):
            raise ValueError(
                "timestep_sampler.spread=stratified needs the images of an optimizer "
                f"step, got {batch}"
            )
        self.spread, self.batch = spread, batch

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
        strata = self._strata(generator).to(generator.device)
        return (strata + rand(n, generator)) / self.batch

    def _strata(self, generator: ImageGenerators) -> Tensor:
        places = [divmod(position, self.batch) for position in generator.positions]
        orders = {step: self._order(generator, step) for step in {step for step, _ in places}}
        return torch.stack([orders[step][place] for step, place in places])

    def _order(self, generator: ImageGenerators, step: int) -> Tensor:
        # New for each step: no place in a batch, and no rank, has the same interval at every step.
        seed = derive_seed(generator.seed, step, stream=f"{generator.stream}/strata")
        return torch.randperm(self.batch, generator=torch.Generator().manual_seed(seed))


def owen_scramble(position: int, *, key: str) -> int:
    """The lowest FRACTION_BITS bits of `position`, mirrored and scrambled.

    Owen's nested scrambling in base 2: whether a bit is flipped is random, but the same for all
    positions with the same lower bits, so that equal intervals are permuted and none is hit twice.
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
    """`quantile` of each number (B,) by itself on the CPU.

    There vector instructions, which do most of a batch, round differently from those that do the
    rest: the last digit of t would depend on an image's place in the batch.
    """
    return torch.stack([quantile(each) for each in u]) if u.device.type == "cpu" else quantile(u)


class PowerTimestepSampler(Uniforms):
    """t in [0, 1) with density proportional to t^(power - 1).

    1 is uniform (Ho et al. 2020, algorithm 1). Above 1 there are more noisy times, which decide the
    layout of an image.
    """

    def __init__(
        self, power: float = 1.0, *, spread: str = "independent", batch: int | None = None
    ) -> None:
        super().__init__(spread=spread, batch=batch)
        if power <= 0:
            raise ValueError(f"time_power must be above 0, got {power}")
        self.power = power

    def __call__(self, n: int, generator: Generators) -> Tensor:
        u = super().__call__(n, generator)
        return apply_elementwise(lambda u: u ** (1 / self.power), u)


class LogitNormalTimestepSampler(Uniforms):
    """t in (0, 1) whose log(t / (1 - t)) is normal (Esser et al. 2024, section 3.1).

    arXiv:2403.03206. `mean` above 0 favours noisy times; a small `std` favours those around the
    median.
    """

    def __init__(
        self,
        mean: float = 0.0,
        std: float = 1.0,
        *,
        spread: str = "independent",
        batch: int | None = None,
    ) -> None:
        super().__init__(spread=spread, batch=batch)
        if std <= 0:
            raise ValueError(f"timestep_sampler.std must be above 0, got {std}")
        self.mean, self.std = mean, std

    def __call__(self, n: int, generator: Generators) -> Tensor:
        def quantile(u: Tensor) -> Tensor:
            return (self.mean + self.std * torch.special.ndtri(u)).sigmoid()

        return apply_elementwise(quantile, super().__call__(n, generator))
