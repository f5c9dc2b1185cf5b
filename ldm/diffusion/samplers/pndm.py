"""PNDM without Runge-Kutta steps, known as PLMS: the sampler of Stable Diffusion's folders."""

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ldm.diffusion.samplers import base
from ldm.diffusion.samplers.base import NoiseLevel, Sampler, StepIterator, Trajectory
from ldm.diffusion.samplers.spacing import LINEAR_SPACINGS

# Adams-Bashforth weights of the last outputs, from old to new, for even steps.
ADAMS_WEIGHTS = (
    (1.0,),
    (-1 / 2, 3 / 2),
    (5 / 12, -16 / 12, 23 / 12),
    (-9 / 24, 37 / 24, -59 / 24, 55 / 24),
)
AVERAGES = ("eps", "v")


@dataclass(frozen=True, kw_only=True)
class PNDMSampler(Sampler):
    """Linear multistep of order 4 in the network's output (Liu et al. 2022, PNDM, equation 12).

    The first step is taken twice, with the mean of the outputs at both ends: steps + 1 calls.
    average: eps or v, which the network predicts; it is what diffusers' PNDMScheduler averages
    with skip_prk_steps=true.
    """

    average: str = "eps"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.average not in AVERAGES:
            raise ValueError(f"average '{self.average}' is none of {', '.join(AVERAGES)}")
        if self.spacing not in LINEAR_SPACINGS:
            raise ValueError(
                f"sampler=pndm has the weights of even steps, and sampler.spacing={self.spacing} "
                f"has none: take {', '.join(LINEAR_SPACINGS)}, or sampler=dpmpp_2m"
            )

    def iterate(self, x: Tensor, path: Trajectory) -> StepIterator:
        outputs: list[Tensor] = []
        levels = path.noise_levels
        for i, (now, then) in enumerate(pairwise(levels)):
            x0_hat = path.x0_hat(x, i)
            if now[0] == 0 and self.average == "eps":  # eps says nothing of x0 there
                x = base.take_step(x, x0_hat, now, then)
                yield x, x0_hat
                continue
            outputs = [*outputs, self.to_output(x, x0_hat, now)][-len(ADAMS_WEIGHTS) :]
            if i == 0 and len(levels) > 2:
                x_s = base.take_step(x, x0_hat, now, then)
                at_end = self.to_output(x_s, path.x0_hat(x_s, 1), then)
                mean = (outputs[0] + at_end) / 2
            else:
                weights = ADAMS_WEIGHTS[len(outputs) - 1]
                mean = sum(w * out for w, out in zip(weights, outputs, strict=True))
            x = base.take_step(x, self.to_x0(x, mean, now), now, then)
            yield x, x0_hat

    def to_output(self, x: Tensor, x0_hat: Tensor, level: NoiseLevel) -> Tensor:
        """The eps or v (B, C, h, w) of x at a level whose x0 is x0_hat."""
        alpha, sigma = level
        eps = (x - alpha * x0_hat) / sigma
        return eps if self.average == "eps" else alpha * eps - sigma * x0_hat

    def to_x0(self, x: Tensor, output: Tensor, level: NoiseLevel) -> Tensor:
        """The inverse of `to_output`."""
        alpha, sigma = level
        if self.average == "eps":
            return (x - sigma * output) / alpha
        return (alpha * x - sigma * output) / (alpha**2 + sigma**2)
