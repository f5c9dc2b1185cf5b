"""At which times the images of a batch are trained.

A law gives t as a function of a uniform number u, its quantile function; `Uniforms` says where the
u of an image comes from. Every t is a function of the run's seed and the image's position alone.

Shapes: B batch.
"""

from collections.abc import Callable
from hashlib import blake2b

import torch
from torch import Tensor

from ldm.diffusion.rng import Generators, ImageGenerators, derive_seed, rand

TimestepSampler = Callable[[int, Generators], Tensor]  # B, one generator an image -> t (B,)

SPREADS = ("independent", "stratified", "sobol")
FRACTION_BITS = 53  # of a float64's fraction
TREE_LEVELS = 8  # of a digest: 255 nodes of a tree of choices in its 512 bits


class Uniforms:
    """One number in [0, 1) an image, each uniform by itself, and how they keep apart.

    `independent`: not at all. `stratified`: the images of an optimizer step, `batch` of them on all
    devices together, have one of its `batch` equal parts each, in an order drawn anew each step.
    `sobol`: image i has the i-th number of a low-discrepancy sequence (Sobol 1967, whose first
    dimension is van der Corput's: the bits of i, mirrored), scrambled by the seed (Owen 1995). Any
    2^k positions from a multiple of 2^k on have one of 2^k equal parts each: the steps of a run
    fill one another's gaps, where stratified ones are independent.
    Raises ValueError for an unknown spread, a stratified one without the batch, and, called, where
    a spread other than independent is not told the images' positions.
    """

    def __init__(self, spread: str = "independent", *, batch: int | None = None) -> None:
        if spread not in SPREADS:
            raise ValueError(f"timestep_sampler.spread '{spread}' is none of {', '.join(SPREADS)}")
        if spread == "stratified" and (batch is None or batch < 1):
            raise ValueError(
                f"timestep_sampler.spread=stratified needs the images of an optimizer "
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
            numbers = [
                owen_scramble(position, key=key) / 2**FRACTION_BITS
                for position in generator.positions
            ]
            return torch.tensor(numbers, dtype=torch.float64)
        strata = self._strata(generator).to(generator.device)
        return (strata + rand(n, generator)) / self.batch

    def _strata(self, draws: ImageGenerators) -> Tensor:
        places = [divmod(position, self.batch) for position in draws.positions]
        orders = {step: self._order(draws, step) for step in {step for step, _ in places}}
        return torch.stack([orders[step][place] for step, place in places])

    def _order(self, draws: ImageGenerators, step: int) -> Tensor:
        # Drawn anew, so that no place in a batch, and no rank, has the same times at every step.
        seed = derive_seed(draws.seed, step, stream=f"{draws.stream}/strata")
        return torch.randperm(self.batch, generator=torch.Generator().manual_seed(seed))


def owen_scramble(position: int, *, key: str) -> int:
    """The lowest BITS bits of `position`, mirrored, each turned or not as those before it say.

    That is Owen's nested scrambling in base 2: whether a bit is turned is drawn once for all
    positions that share the bits below it, so that parts are exchanged and none is filled twice.
    """
    mirrored = 0
    for first in range(0, FRACTION_BITS, TREE_LEVELS):
        shared = position % 2**first
        choices = int.from_bytes(blake2b(f"{key}/{first}/{shared}".encode()).digest(), "big")
        for level in range(first, min(first + TREE_LEVELS, FRACTION_BITS)):
            depth = level - first
            node = 2**depth + (position >> first) % 2**depth  # of a binary tree, 1 is its root
            turned = (position >> level ^ choices >> node) & 1
            mirrored = 2 * mirrored + turned
    return mirrored


def apply_elementwise(law: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """`law` of each number (B,) by itself.

    Of many at once a processor's vector instructions take most, and those round otherwise than what
    takes the rest: the last digit of an image's time would depend on its place in the batch.
    """
    return torch.stack([law(each) for each in u]) if u.device.type == "cpu" else law(u)


class PowerTimestepSampler:
    """t in [0, 1) with the density power t^(power - 1).

    1 is uniform (Ho et al. 2020, algorithm 1). Above 1 the noisy times come more often, where it is
    decided what is where in a picture: most of what a text says. `spread` and `batch` are those of
    `Uniforms`. Raises ValueError where the power is not positive.
    """

    def __init__(
        self, power: float = 1.0, *, spread: str = "independent", batch: int | None = None
    ) -> None:
        if power <= 0:
            raise ValueError(f"time_power must be above 0, got {power}")
        self.power = power
        self.uniforms = Uniforms(spread, batch=batch)

    def __call__(self, n: int, generator: Generators) -> Tensor:
        return apply_elementwise(lambda u: u ** (1 / self.power), self.uniforms(n, generator))


class LogitNormalTimestepSampler:
    """t in (0, 1) whose log(t / (1 - t)) is normal (Esser et al. 2024, section 3.1).

    arXiv:2403.03206. `mean` above 0 favours noisy times; a small `std` favours those around the
    middle one. `spread` and `batch` are those of `Uniforms`. Raises ValueError where the deviation
    is not positive.
    """

    def __init__(
        self,
        mean: float = 0.0,
        std: float = 1.0,
        *,
        spread: str = "independent",
        batch: int | None = None,
    ) -> None:
        if std <= 0:
            raise ValueError(f"timestep_sampler.std must be above 0, got {std}")
        self.mean, self.std = mean, std
        self.uniforms = Uniforms(spread, batch=batch)

    def __call__(self, n: int, generator: Generators) -> Tensor:
        def law(u: Tensor) -> Tensor:
            return (self.mean + self.std * torch.special.ndtri(u)).sigmoid()

        return apply_elementwise(law, self.uniforms(n, generator))
