"""What the network predicts, and the loss it is trained with.

Shapes: B batch, C latent channels, h w latent grid.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldm.diffusion.condition import Condition
from ldm.diffusion.noise import Generators, rand, randn
from ldm.diffusion.schedule import Schedule, expand

Network = Callable[[Tensor, Tensor, Condition], Tensor]  # x_t, timestep, cond -> out

# out = a x0 + b eps: a parameterisation is its row (a, b), as a function of alpha and sigma.
PREDICTIONS = {
    "eps": lambda alpha, sigma: (0.0, 1.0),
    "x0": lambda alpha, sigma: (1.0, 0.0),
    "v": lambda alpha, sigma: (-sigma, alpha),  # Salimans and Ho 2022, appendix D
    "flow": lambda alpha, sigma: (-1.0, 1.0),  # Lipman et al. 2023: dx_t/dt on the Flow schedule
}


class Prediction:
    """The quantity a network is asked for: "eps", "x0", "v" or "flow"; ValueError for others."""

    def __init__(self, kind: str) -> None:
        if kind not in PREDICTIONS:
            raise ValueError(f"prediction '{kind}' is none of {', '.join(PREDICTIONS)}")
        self.kind = kind
        self.row = PREDICTIONS[kind]

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the network should have said; x0 and eps (B, ...), alpha and sigma () or (B,)."""
        a, b = self.row(expand(alpha, x0), expand(sigma, x0))
        return a * x0 + b * eps

    def to_x0(self, out: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """x0_hat from what the network said; shapes as in `target`."""
        alpha, sigma = expand(alpha, x_t), expand(sigma, x_t)
        a, b = self.row(alpha, sigma)
        return (b * x_t - sigma * out) / (b * alpha - a * sigma)


class UniformWeighting:
    """Every noise level counts alike: Ho et al. 2020, equation 14, in the predicted quantity."""

    def __call__(self, log_snr: Tensor, prediction: Prediction) -> Tensor:
        return torch.ones_like(log_snr)


class PowerTimes:
    """t in [0, 1) with the density power t^(power - 1), one independent draw an image.

    1 is uniform (Ho et al. 2020, algorithm 1). Above 1 the noisy times come more often, where it is
    decided what is where in a picture: most of what a text says. Raises ValueError where the power
    is not positive.
    """

    def __init__(self, power: float = 1.0) -> None:
        if power <= 0:
            raise ValueError(f"time_power must be above 0, got {power}")
        self.power = power

    def __call__(self, n: int, generator: Generators) -> Tensor:
        return rand(n, generator) ** (1 / self.power)


class Objective(nn.Module):
    """A schedule, a prediction, a loss weighting and a law for t: all of the training target."""

    def __init__(
        self,
        schedule: Schedule,
        prediction: Prediction,
        *,
        weighting: Callable[[Tensor, Prediction], Tensor],
        time_sampler: Callable[[int, Generators], Tensor],
    ) -> None:
        super().__init__()
        alpha, _ = schedule(torch.ones((), dtype=torch.float64))
        if prediction.kind == "eps" and alpha < 1e-6:
            raise ValueError(
                "objective=eps cannot be sampled on a schedule that ends in pure noise (alpha = 0 "
                "at t = 1), where eps says nothing of x0: take objective=v, x0 or flow"
            )
        self.schedule = schedule
        self.prediction = prediction
        self.weighting = weighting
        self.time_sampler = time_sampler

    def loss(self, net: Network, x0: Tensor, cond: Condition, *, generator: Generators) -> Tensor:
        """The weighted squared error of each image (B,), at random times and noise."""
        t = self.time_sampler(len(x0), generator).to(x0.device)
        eps = randn(x0.shape, generator, device=x0.device, dtype=x0.dtype)
        return self.loss_at(net, x0, cond, t=t, eps=eps)

    def loss_at(
        self, net: Network, x0: Tensor, cond: Condition, *, t: Tensor, eps: Tensor
    ) -> Tensor:
        """As `loss`, at given times (B,), snapped to the schedule, and noise (B, C, h, w)."""
        t = self.schedule.snap(t)
        alpha, sigma = (part.to(x0.dtype) for part in self.schedule(t))
        x_t = expand(alpha, x0) * x0 + expand(sigma, x0) * eps  # (B, C, h, w)
        out = net(x_t, self.schedule.timestep(t).to(x0.dtype), cond)  # (B, C, h, w)
        error = (out - self.prediction.target(x0, eps, alpha, sigma)).square()
        return error.flatten(1).mean(1) * self.weighting(self.schedule.log_snr(t), self.prediction)

    def denoised(self, net: Network, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """x0_hat (B, C, h, w) of x_t at t, () or (B,)."""
        alpha, sigma = (part.to(x_t.dtype) for part in self.schedule(t))
        timestep = self.schedule.timestep(t).to(x_t.dtype)
        out = net(x_t, timestep, cond).to(x_t.dtype)
        return self.prediction.to_x0(out, x_t, alpha, sigma)
