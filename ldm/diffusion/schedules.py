"""Noise schedules: x_t = alpha_t x0 + sigma_t eps, with t in [0, 1] and t = 0 the data."""

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class Schedule(nn.Module):
    """t -> (alpha, sigma), and what follows from them: a new schedule is `forward` alone."""

    steps: int = 1000  # the resolution of the network's timesteps, by convention

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at `t` in [0, 1], of t's shape, in float32 or float64."""
        raise NotImplementedError

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2), of t's shape; +inf at t = 0."""
        alpha, sigma = self(t)
        return 2 * (alpha.log() - sigma.log())

    def snap(self, t: Tensor) -> Tensor:
        """The first time in (0, 1] from `t` on that training uses."""
        return t

    def timestep(self, t: Tensor) -> Tensor:
        """The network's input for `t`."""
        return t * self.steps

    def noise_to_signal_ratio(self, t: Tensor) -> Tensor:
        """r = sigma / alpha at `t`, EDM's noise level; +inf where alpha is 0."""
        alpha, sigma = self(t)
        return sigma / alpha

    def timesteps_at_ratio(self, r: Tensor) -> Tensor:
        """The times in [0, 1] at which sigma / alpha is `r`, in float64; otherwise the nearest."""
        low, high = torch.zeros_like(r), torch.ones_like(r)
        for _ in range(60):  # bisection, exact in double precision
            middle = (low + high) / 2
            noisier = self.noise_to_signal_ratio(middle) > r
            low, high = torch.where(noisier, low, middle), torch.where(noisier, middle, high)
        return torch.where(r > 0, high, 0)

    def round_index(self, index: Tensor) -> Tensor:
        """The nearest points, counted from 0 at t = 0 to `steps` at t = 1."""
        return index

    def published_ends(self, start: float) -> tuple[float, float]:
        """The times between which diffusers' `linspace` is even, from `start` on."""
        return self.on_grid(torch.tensor(start, dtype=torch.float64)).item(), 1 / self.steps

    def interpolate_ratio(self, t: Tensor) -> Tensor:
        """r at `t` as diffusers has it: linear in t between the points of a table."""
        return self.noise_to_signal_ratio(t)

    def interpolate_timestep(self, t: Tensor, scale: Callable[[Tensor], Tensor]) -> Tensor:
        """The network's input for `t`: on a table linear in scale(r) between its points."""
        return self.timestep(t)

    def on_grid(self, t: Tensor) -> Tensor:
        """The nearest times at which the schedule is defined."""
        return t

    def stride(self, start: float, steps: int) -> float:
        """The longest stride of `steps` strides from `start` down to 0."""
        return start / steps


class DiscreteSchedule(Schedule):
    """A variance-preserving schedule from DDPM's table of betas (Ho et al. 2020, section 2).

    Index k of the table is at t = (k + 1) / steps and is the network's input, as for published
    weights; between these log(alpha^2) is linear in t. zero_terminal_snr: alpha is shifted and
    scaled to 0 at t = 1 (Lin et al. 2024, arXiv:2305.08891, algorithm 1).
    """

    def __init__(self, betas: Tensor, *, zero_terminal_snr: bool = False) -> None:
        super().__init__()
        if betas.ndim != 1 or len(betas) < 1 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError("betas must be one row of numbers between 0 and 1")
        self.steps = len(betas)
        log_alpha_bar = torch.log1p(-betas.double()).cumsum(0)
        if zero_terminal_snr:
            log_alpha_bar = rescale_zero_terminal_snr(log_alpha_bar)
        table = torch.cat([torch.zeros(1, dtype=torch.float64), log_alpha_bar])
        if not bool((table.diff() < 0).all()):
            raise ValueError(
                "each step of a noise schedule must lower alpha: these betas are too small, or too "
                "many and too large, for floating point"
            )
        if (left := (table[-1] / 2).exp()) > 0.1:
            warnings.warn(
                f"at t = 1 this noise schedule still holds {left:.0%} of the image, and sampling "
                "starts from pure noise: take scheduler.zero_terminal_snr=true, or a larger "
                "scheduler.end (betas of 1000 steps, times 1000 / steps)",
                stacklevel=3,
            )
        self.register_buffer("log_alpha_bar", table, persistent=False)

    def _apply(self, fn, recurse: bool = True):
        # The table follows the device but not the dtype: half precision would round it.
        table = self.log_alpha_bar
        super()._apply(fn, recurse)
        self.log_alpha_bar = table.to(self.log_alpha_bar.device)
        return self

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha_bar = self._at(t)
        dtype = torch.promote_types(t.dtype, torch.float32)
        alpha, sigma = (log_alpha_bar / 2).exp(), (-torch.expm1(log_alpha_bar)).sqrt()
        return alpha.to(dtype), sigma.to(dtype)

    def log_snr(self, t: Tensor) -> Tensor:
        # Not from alpha, which underflows to 0 where its logarithm is still finite.
        log_alpha_bar = self._at(t)
        log_snr = log_alpha_bar - (-torch.expm1(log_alpha_bar)).log()
        return log_snr.to(torch.promote_types(t.dtype, torch.float32))

    def snap(self, t: Tensor) -> Tensor:
        # The small shift keeps a point of the table in place if it is rounded up.
        return (t * self.steps - 1e-3).ceil().clamp(1, self.steps) / self.steps

    def round_index(self, index: Tensor) -> Tensor:
        return index.round()

    def interpolate_ratio(self, t: Tensor) -> Tensor:
        below = self._point_below(t)
        low, high = self._ratio_of_diffusers(below), self._ratio_of_diffusers(below + 1)
        return low + (t * self.steps - below) * (high - low)

    def interpolate_timestep(self, t: Tensor, scale: Callable[[Tensor], Tensor]) -> Tensor:
        below = self._point_below(t)
        points = (t * self.steps, below, below + 1)
        here, low, high = (scale(self._ratio_of_diffusers(point)) for point in points)
        return below - 1 + ((here - low) / (high - low)).clamp(0, 1)

    def on_grid(self, t: Tensor) -> Tensor:
        return (t * self.steps).round() / self.steps

    def stride(self, start: float, steps: int) -> float:
        return round(start * self.steps) // steps / self.steps

    def timestep(self, t: Tensor) -> Tensor:
        return t * self.steps - 1

    def _point_below(self, t: Tensor) -> Tensor:
        return (t * self.steps).floor().clamp(1, max(self.steps - 1, 1))

    def _ratio_of_diffusers(self, point: Tensor) -> Tensor:
        # Where no signal is left, diffusers takes alpha^2 = 2^-24.
        r = self.noise_to_signal_ratio((point / self.steps).clamp(max=1))
        return torch.where(r.isinf(), math.sqrt(2**24 - 1), r)

    def _at(self, t: Tensor) -> Tensor:
        position = t.double() * self.steps
        below = position.floor().clamp(0, self.steps - 1).long()
        table = self.log_alpha_bar.to(t.device)
        low, high = table[below], table[below + 1]
        along = position - below
        # In a last step to alpha = 0 alpha itself is linear, as its logarithm cannot be.
        to_zero = low + 2 * torch.log1p(-along)
        return torch.where(high.isinf(), to_zero, low + along * (high - low))


class FlowSchedule(Schedule):
    """The straight line alpha = 1 - t, sigma = t (Lipman et al. 2023; Liu et al. 2023).

    shift: s replaces t by s t / (1 + (s - 1) t), also as the network's input, so that log SNR is
    2 log(s) lower (Esser et al. 2024, arXiv:2403.03206, section 5.3.2). base: see `compute_shift`.
    """

    def __init__(self, *, shift: float = 1.0, base: int = 4096) -> None:
        super().__init__()
        if isinstance(shift, str) or not 0 < shift < math.inf:
            raise ValueError(f"scheduler.shift must be above 0 (1 is none), got {shift}")
        self.shift = shift

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        if self.shift == 1:
            return 1 - t, t
        whole = (1 - t) + self.shift * t  # in this form alpha is exactly 0 at t = 1
        return (1 - t) / whole, self.shift * t / whole

    def timestep(self, t: Tensor) -> Tensor:
        return self(t)[1] * self.steps

    def published_ends(self, start: float) -> tuple[float, float]:
        # The shift is applied twice to the last time (FlowMatchEulerDiscreteScheduler).
        return start, self(torch.tensor(1 / self.steps, dtype=torch.float64))[1].item()


class LaplaceSchedule(Schedule):
    """Variance-preserving; log SNR has a Laplace distribution if t is uniform.

    log SNR = location - scale sign(1/2 - t) log(1 - 2 |t - 1/2|) (Hang et al. 2024,
    arXiv:2407.03297, table 1). It ends in pure noise. diffusers' "laplace" differs: it takes
    sqrt(SNR / (1 + SNR)), which is alpha, for alpha^2 (its pull request 11320).
    """

    def __init__(self, *, location: float = 0.0, scale: float = 0.5) -> None:
        super().__init__()
        if not (0 < scale < math.inf and math.isfinite(location)):
            raise ValueError(
                f"scheduler.scale must be above 0 and scheduler.location finite, got {scale} and "
                f"{location}"
            )
        self.location, self.scale = location, scale

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_snr = self.log_snr(t)
        return log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()

    def log_snr(self, t: Tensor) -> Tensor:
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        tail = 2 * torch.minimum(t, 1 - t)  # 1 - 2 |t - 1/2|, exact near both ends
        return self.location - self.scale * (0.5 - t).sign() * tail.log()


def linear(
    *, steps: int = 1000, start: float = 1e-4, end: float = 0.02, zero_terminal_snr: bool = False
) -> DiscreteSchedule:
    """DDPM's betas: evenly spaced from `start` to `end` (Ho et al. 2020, section 4)."""
    return DiscreteSchedule(linspace_steps(start, end, steps), zero_terminal_snr=zero_terminal_snr)


def scaled_linear(
    *,
    steps: int = 1000,
    start: float = 0.00085,
    end: float = 0.012,
    zero_terminal_snr: bool = False,
) -> DiscreteSchedule:
    """Stable Diffusion's betas: square roots evenly spaced (Rombach et al. 2022, their code)."""
    roots = linspace_steps(math.sqrt(max(start, 0)), math.sqrt(max(end, 0)), steps)
    return DiscreteSchedule(roots.square(), zero_terminal_snr=zero_terminal_snr)


def sigmoid(
    *, steps: int = 1000, start: float = 1e-4, end: float = 0.02, zero_terminal_snr: bool = False
) -> DiscreteSchedule:
    """Betas rise as a sigmoid from -6 to 6 (Xu et al. 2022, GeoDiff), as in diffusers."""
    rise = linspace_steps(-6, 6, steps).sigmoid()
    return DiscreteSchedule(start + (end - start) * rise, zero_terminal_snr=zero_terminal_snr)


def cosine(
    *,
    steps: int = 1000,
    offset: float = 0.008,
    max_beta: float = 0.999,
    zero_terminal_snr: bool = False,
) -> DiscreteSchedule:
    """alpha^2 falls as a squared cosine (Nichol and Dhariwal 2021, equation 17)."""
    t = linspace_steps(0, 1, steps, more=1)
    alpha_bar = ((t + offset) / (1 + offset) * math.pi / 2).cos().square()
    betas = betas_for_alpha_bar(alpha_bar, max_beta)
    return DiscreteSchedule(betas, zero_terminal_snr=zero_terminal_snr)


def sigmoid_alpha(
    *,
    steps: int = 1000,
    start: float = -3.0,
    end: float = 3.0,
    tau: float = 1.0,
    max_beta: float = 0.999,
    zero_terminal_snr: bool = False,
) -> DiscreteSchedule:
    """alpha^2 falls as sigmoid(-x / tau), x from start to end (Jabri et al. 2022, 2212.11972)."""
    if not (tau > 0 and start < end):
        raise ValueError(f"needs tau > 0 and start < end, not {tau}, {start} and {end}")
    curve = (-linspace_steps(start, end, steps, more=1) / tau).sigmoid()
    alpha_bar = (curve - curve[-1]) / (curve[0] - curve[-1])
    betas = betas_for_alpha_bar(alpha_bar, max_beta)
    return DiscreteSchedule(betas, zero_terminal_snr=zero_terminal_snr)


def trained_betas(
    *, betas: Sequence[float] | None = None, zero_terminal_snr: bool = False
) -> DiscreteSchedule:
    """A schedule of these betas (trained_betas in diffusers); None: those of DDPM."""
    given = linspace_steps(1e-4, 0.02, 1000).tolist() if betas is None else [*betas]
    table = torch.tensor(given, dtype=torch.float64)
    return DiscreteSchedule(table, zero_terminal_snr=zero_terminal_snr)


def linspace_steps(first: float, last: float, steps: int, *, more: int = 0) -> Tensor:
    """steps + more evenly spaced numbers in float64; ValueError unless steps is a whole number."""
    if steps < 1 or steps != int(steps):
        raise ValueError(f"scheduler.steps must be a whole number above 0, got {steps}")
    return torch.linspace(first, last, int(steps) + more, dtype=torch.float64)


def betas_for_alpha_bar(alpha_bar: Tensor, max_beta: float) -> Tensor:
    """The betas (steps,) of a table of alpha^2 (steps + 1,); the last is `max_beta`, not 1."""
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta)


def rescale_zero_terminal_snr(log_alpha_bar: Tensor) -> Tensor:
    """A table of log(alpha^2) with its alpha shifted and scaled (Lin et al. 2024, algorithm 1)."""
    if len(log_alpha_bar) < 2:
        raise ValueError("zero_terminal_snr needs at least two steps")
    alpha = (log_alpha_bar / 2).exp()
    first, last = alpha[0], alpha[-1]
    return 2 * ((alpha - last) / (first - last) * first).log()


def expand_dims_like(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient () or (B,) in a shape that multiplies `x` (B, ...), on its device."""
    return coefficient.reshape(-1, *[1] * (x.ndim - 1)).to(x.device)


def is_same_schedule(a: Schedule, b: Schedule) -> bool:
    """Returns whether two schedules have the same noise at the same times."""
    t = torch.linspace(0, 1, 65, dtype=torch.float64)
    return all(torch.equal(one.cpu(), two.cpu()) for one, two in zip(a(t), b(t), strict=True))
