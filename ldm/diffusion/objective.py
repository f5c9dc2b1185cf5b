"""What the network predicts, and the loss it is trained with.

Shapes: B batch, C latent channels, h w latent grid.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldm.diffusion.conditioning import Condition
from ldm.diffusion.losses import ElementwiseLoss, SquaredLoss
from ldm.diffusion.rng import Generators, derive_generators, randn
from ldm.diffusion.schedules import Schedule, expand_dims_like
from ldm.diffusion.timesteps import TimestepSampler
from ldm.diffusion.weightings import Weighting

Network = Callable[[Tensor, Tensor, Condition], Tensor]  # x_t, timestep, cond -> out

# out = a x0 + b eps: a parameterisation is its row (a, b), as a function of alpha and sigma.
PREDICTIONS = {
    "eps": lambda alpha, sigma: (0.0, 1.0),
    "x0": lambda alpha, sigma: (1.0, 0.0),
    "v": lambda alpha, sigma: (-sigma, alpha),  # Salimans and Ho 2022, appendix D
    "flow": lambda alpha, sigma: (-1.0, 1.0),  # Lipman et al. 2023: dx_t/dt on the Flow schedule
}


MIN_COEFFICIENT = 1e-12  # a share of signal or noise that is as good as none
MAX_LOSS_WEIGHT = 1e6  # a weight; the laws themselves are near 1 at middling noise


class Prediction:
    """The quantity a network is asked for: "eps", "x0", "v" or "flow"; ValueError for others."""

    def __init__(self, kind: str) -> None:
        if kind not in PREDICTIONS:
            raise ValueError(f"prediction '{kind}' is none of {', '.join(PREDICTIONS)}")
        self.kind = kind
        self.row = PREDICTIONS[kind]

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the network should have said; x0 and eps (B, ...), alpha and sigma () or (B,)."""
        a, b = self.row(expand_dims_like(alpha, x0), expand_dims_like(sigma, x0))
        return a * x0 + b * eps

    def to_x0(self, out: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """x0_hat from what the network said; shapes as in `target`."""
        alpha, sigma = expand_dims_like(alpha, x_t), expand_dims_like(sigma, x_t)
        a, b = self.row(alpha, sigma)
        return (b * x_t - sigma * out) / (b * alpha - a * sigma)

    def gain(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The squared error of `out` per squared error of x0_hat, at the same x_t.

        With eps = (x_t - alpha x0) / sigma, out = (a - b alpha / sigma) x0 + (b / sigma) x_t.
        """
        a, b = self.row(alpha, sigma)
        return ((b * alpha - a * sigma) / sigma).square()


class Objective(nn.Module):
    """A schedule, a prediction, and how much what counts at which times: the training target.

    `loss` is what an element's error costs, its square where there is none. `offset_noise` adds
    to eps that many times a normal number that all places of a channel share, so that a picture's
    mean is trained as well (Guttenberg 2023, crosslabs.org). `input_perturbation` shows the network
    a noise that many times a normal number off the one that it is to predict (Ning et al. 2023,
    arXiv:2301.11706, algorithm 1). Validation (`loss_at`) has neither.
    Raises ValueError for `eps` where there is no signal at t = 1, and for a weight without bound.
    """

    def __init__(
        self,
        schedule: Schedule,
        prediction: Prediction,
        *,
        weighting: Weighting,
        timestep_sampler: TimestepSampler,
        loss: ElementwiseLoss | None = None,
        offset_noise: float = 0.0,
        input_perturbation: float = 0.0,
    ) -> None:
        super().__init__()
        alpha, _ = schedule(torch.ones((), dtype=torch.float64))
        if prediction.kind == "eps" and alpha < 1e-6:
            raise ValueError(
                f"objective=eps cannot be sampled on a schedule that ends in pure noise (alpha = "
                f"{alpha:.1g} at t = 1), where eps says nothing of x0: take objective=v, x0 or "
                "flow, or a scheduler without zero terminal SNR"
            )
        shares = {"offset_noise": offset_noise, "input_perturbation": input_perturbation}
        for name, share in shares.items():
            if not 0 <= share < math.inf:
                raise ValueError(f"objective.{name} must be 0 (none) or more, got {share}")
        self.schedule = schedule
        self.prediction = prediction
        self.weighting = weighting
        self.timestep_sampler = timestep_sampler
        self.loss_function = loss or SquaredLoss()
        self.offset_noise = offset_noise
        self.input_perturbation = input_perturbation
        self._check_weights()

    def loss(
        self,
        net: Network,
        x0: Tensor,
        cond: Condition,
        *,
        generator: Generators,
        shape_noise: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The weighted error of each image (B,), at random times and noise.

        mix: what becomes of white noise (B, C, h, w) before it is used; see `Plain.mix` of a task.
        """
        like = {"device": x0.device, "dtype": x0.dtype}
        t = self.timestep_sampler(len(x0), generator).to(x0.device)
        eps = randn(x0.shape, generator, **like)
        if shape_noise is not None:
            eps = shape_noise(eps)
        if self.offset_noise:
            shape = (*x0.shape[:2], *[1] * (x0.ndim - 2))
            eps = eps + self.offset_noise * randn(
                shape, derive_generators(generator, "offset"), **like
            )
        shown = eps
        if self.input_perturbation:
            off = randn(x0.shape, derive_generators(generator, "perturbation"), **like)
            off = off if shape_noise is None else shape_noise(off)
            shown = eps + self.input_perturbation * off
        return self._loss(net, x0, cond, t, eps, shown)

    def loss_at(
        self, net: Network, x0: Tensor, cond: Condition, *, t: Tensor, eps: Tensor
    ) -> Tensor:
        """As `loss`, at given times (B,), snapped to the schedule, and noise (B, C, h, w)."""
        return self._loss(net, x0, cond, t, eps, eps)

    def weight(self, t: Tensor) -> Tensor:
        """How much an image at t (B,) counts, (B,), in the squared error of the output."""
        # Where there is no signal or no noise the laws' limits are those of a trace of them.
        alpha, sigma = (part.double().clamp(min=MIN_COEFFICIENT) for part in self.schedule(t))
        weight = self.weighting((alpha / sigma).square(), self.prediction.gain(alpha, sigma))
        return weight.to(torch.promote_types(t.dtype, torch.float32))

    def _loss(
        self, net: Network, x0: Tensor, cond: Condition, t: Tensor, eps: Tensor, shown: Tensor
    ) -> Tensor:
        t = self.schedule.snap(t)
        alpha, sigma = (part.to(x0.dtype) for part in self.schedule(t))
        x_t = expand_dims_like(alpha, x0) * x0 + expand_dims_like(sigma, x0) * shown  # (B, C, h, w)
        out = net(x_t, self.schedule.timestep(t).to(x0.dtype), cond)  # (B, C, h, w)
        error = out - self.prediction.target(x0, eps, alpha, sigma)
        cost = self.loss_function(error, t, self.schedule.log_snr(t))
        return cost.flatten(1).mean(1) * self.weight(t)

    def _check_weights(self) -> None:
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        ends[0] = self.schedule.snap(ends[:1])[0]
        for t, weight in zip(ends.tolist(), self.weight(ends).tolist(), strict=True):
            if not weight < MAX_LOSS_WEIGHT:
                raise ValueError(
                    f"with objective={self.prediction.kind} this weighting gives t = {t:.3g} a "
                    f"weight of {weight:.1g}, and nothing else would be trained: take objective=v"
                )

    def predict_x0(self, net: Network, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """x0_hat (B, C, h, w) of x_t at t, () or (B,)."""
        alpha, sigma = (part.to(x_t.dtype) for part in self.schedule(t))
        timestep = self.schedule.timestep(t).to(x_t.dtype)
        out = net(x_t, timestep, cond).to(x_t.dtype)
        return self.prediction.to_x0(out, x_t, alpha, sigma)

    def x0_at_zero_output(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x0_hat (B, C, h, w) of x_t at t, () or (B,), where the network's output is 0."""
        alpha, sigma = (part.to(x_t.dtype) for part in self.schedule(t.to(x_t.device)))
        return self.prediction.to_x0(torch.zeros_like(x_t), x_t, alpha, sigma)
