"""The training objective: a schedule, a prediction, a weighting and a loss."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldm.diffusion.conditioning import Condition
from ldm.diffusion.losses import ElementwiseLoss, SquaredLoss
from ldm.diffusion.predictions import Prediction
from ldm.diffusion.rng import Generators, derive_generators, randn
from ldm.diffusion.schedules import Schedule, expand_dims_like
from ldm.diffusion.timesteps import TimestepSampler
from ldm.diffusion.weightings import Weighting
from ldm.utils.transfer import send

Network = Callable[[Tensor, Tensor, Condition], Tensor]  # x_t, timestep, cond -> out

MIN_COEFFICIENT = 1e-12  # of alpha and sigma, for weights where there is no signal or no noise
MAX_LOSS_WEIGHT = 1e6  # weights are near 1 at medium noise


class Objective(nn.Module):
    """The quantity that a network is trained to predict, and the cost of its errors.

    loss: of each element of the error; squared by default. offset_noise: eps gets this many times a
    normal number per channel (Guttenberg 2023, crosslabs.org). input_perturbation: the network's
    input gets this many times more noise (Ning et al. 2023, arXiv:2301.11706, algorithm 1).
    Raises ValueError for `eps` on a schedule without signal at t = 1, and for unbounded weights.
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
        shape_noise: Callable[[Tensor], Tensor] = lambda noise: noise,
    ) -> Tensor:
        """The weighted loss of each image (B,), at random times and noise.

        shape_noise: white noise (B, C, h, w) to the noise that is used; see `Task.shape_noise`.
        """

        def draw(shape: tuple[int, ...], generator: Generators) -> Tensor:
            return randn(shape, generator, device=x0.device, dtype=x0.dtype)

        t = send(self.timestep_sampler(len(x0), generator), x0.device)
        eps = shape_noise(draw(x0.shape, generator))
        if self.offset_noise:
            shape = (*x0.shape[:2], *[1] * (x0.ndim - 2))
            eps = eps + self.offset_noise * draw(shape, derive_generators(generator, "offset"))
        input_eps = None
        if self.input_perturbation:
            more = shape_noise(draw(x0.shape, derive_generators(generator, "perturbation")))
            input_eps = eps + self.input_perturbation * more
        return self.loss_at(net, x0, cond, t=t, eps=eps, input_eps=input_eps)

    def loss_at(
        self,
        net: Network,
        x0: Tensor,
        cond: Condition,
        *,
        t: Tensor,
        eps: Tensor,
        input_eps: Tensor | None = None,
    ) -> Tensor:
        """The same at times (B,), snapped to the schedule, and noise (B, C, h, w).

        input_eps: the noise of the network's input, by default `eps`.
        """
        t = self.schedule.snap(t)
        alpha, sigma = (part.to(x0.dtype) for part in self.schedule(t))
        noise = expand_dims_like(sigma, x0) * (eps if input_eps is None else input_eps)
        x_t = expand_dims_like(alpha, x0) * x0 + noise
        out = net(x_t, self.schedule.timestep(t).to(x0.dtype), cond)  # (B, C, h, w)
        error = out - self.prediction.target(x0, eps, alpha, sigma)
        loss = self.loss_function(error, t, self.schedule.log_snr(t))
        return loss.flatten(1).mean(1) * self.weight(t)

    def weight(self, t: Tensor) -> Tensor:
        """The weight (B,) of the squared error of the output at t (B,)."""
        alpha, sigma = (part.double().clamp(min=MIN_COEFFICIENT) for part in self.schedule(t))
        weight = self.weighting((alpha / sigma).square(), self.prediction.gain(alpha, sigma))
        return weight.to(torch.promote_types(t.dtype, torch.float32))

    def predict_x0(
        self,
        net: Network,
        x_t: Tensor,
        t: Tensor,
        cond: Condition,
        *,
        timestep: Tensor | None = None,
    ) -> Tensor:
        """x0_hat (B, C, h, w) of x_t at t, () or (B,).

        timestep: the network's input, where a sampler interpolates it, by default that of t.
        """
        alpha, sigma = (part.to(x_t.dtype) for part in self.schedule(t))
        timestep = self.schedule.timestep(t) if timestep is None else timestep
        out = net(x_t, timestep.to(x_t.dtype), cond).to(x_t.dtype)
        return self.prediction.to_x0(out, x_t, alpha, sigma)

    def x0_at_zero_output(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x0_hat (B, C, h, w) of x_t at t, () or (B,), for a network output of 0."""
        alpha, sigma = (part.to(x_t.dtype) for part in self.schedule(t.to(x_t.device)))
        return self.prediction.to_x0(torch.zeros_like(x_t), x_t, alpha, sigma)

    def _check_weights(self) -> None:
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        ends[0] = self.schedule.snap(ends[:1])[0]
        for t, weight in zip(ends.tolist(), self.weight(ends).tolist(), strict=True):
            if not weight < MAX_LOSS_WEIGHT:
                raise ValueError(
                    f"with objective={self.prediction.kind} this weighting gives t = {t:.3g} a "
                    f"weight of {weight:.1g}, and nothing else would be trained: take objective=v"
                )
