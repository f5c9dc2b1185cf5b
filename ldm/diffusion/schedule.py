"""The noise schedule: x_t = alpha_t x0 + sigma_t eps, with t in [0, 1] and t = 0 the data.

Everything else in this folder is written in terms of alpha and sigma.
"""

import math

import torch
from torch import Tensor, nn


class Schedule(nn.Module):
    """t -> (alpha, sigma), and what follows from them."""

    steps: int = 1000  # the resolution at which networks are told the time, by convention

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at `t` in [0, 1]; of t's shape, in float32 or better."""
        raise NotImplementedError

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2): +inf at t = 0; of t's shape."""
        alpha, sigma = self(t)
        return 2 * (alpha.log() - sigma.log())

    def snap(self, t: Tensor) -> Tensor:
        """The time in (0, 1] at which training may take place, nearest above `t`."""
        return t

    def timestep(self, t: Tensor) -> Tensor:
        """What the network is told of `t`."""
        return t * self.steps

    def times(self, steps: int, *, start: float = 1.0, spacing: str = "trailing") -> Tensor:
        """The sampling grid (steps + 1,), in float64 on the CPU, falling from `start` to 0.

        `trailing` begins at the noisiest time, `leading` ends one stride above the cleanest,
        `linspace` holds both (Lin et al. 2024, arXiv:2305.08891, table 2).
        Raises ValueError for an unknown spacing, or steps or start that make no grid.
        """
        if steps < 1 or not 0 < start <= 1:
            raise ValueError(f"a grid needs steps >= 1 and 0 < start <= 1, not {steps} and {start}")
        i = torch.arange(steps, dtype=torch.float64)
        first = 1 / self.steps
        if spacing == "trailing":
            t = self.on_grid(start * (1 - i / steps))
        elif spacing == "leading":
            t = self.on_grid(start * (steps - 1 - i) / steps) + first
        elif spacing == "linspace":
            t = self.on_grid((start - first) * (1 - i / max(steps - 1, 1))) + first
        else:
            raise ValueError(f"spacing '{spacing}' is none of trailing, leading, linspace")
        times = torch.cat([t, torch.zeros(1, dtype=torch.float64)])
        if not bool((times.diff() < 0).all()):
            raise ValueError(
                f"{steps} sampling steps from t = {start} do not fit a schedule of {self.steps}: "
                "take fewer steps"
            )
        return times

    def on_grid(self, t: Tensor) -> Tensor:
        """The nearest times at which the schedule is defined."""
        return t


class Tabled(Schedule):
    """A variance-preserving schedule from DDPM's table of betas (Ho et al. 2020, section 2).

    Index k of the table sits at t = (k + 1) / steps, and the network is told k, so that published
    weights fit. Between its points log(alpha^2) is linear in t.
    """

    def __init__(self, betas: Tensor) -> None:
        super().__init__()
        if betas.ndim != 1 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError("betas must be one row of numbers between 0 and 1")
        self.steps = len(betas)
        log_alpha_bar = torch.log1p(-betas.double()).cumsum(0)
        table = torch.cat([torch.zeros(1, dtype=torch.float64), log_alpha_bar])
        self.register_buffer("log_alpha_bar", table, persistent=False)

    def _apply(self, fn, recurse: bool = True):
        # A half-precision model must not round the table: it follows the device, never the dtype.
        table = self.log_alpha_bar
        super()._apply(fn, recurse)
        self.log_alpha_bar = table.to(self.log_alpha_bar.device)
        return self

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha_bar = self._at(t)
        dtype = torch.promote_types(t.dtype, torch.float32)
        alpha, sigma = (log_alpha_bar / 2).exp(), (-torch.expm1(log_alpha_bar)).sqrt()
        return alpha.to(dtype), sigma.to(dtype)

    def snap(self, t: Tensor) -> Tensor:
        # The small shift keeps a point of the table, rounded up in floating point, where it is.
        return (t * self.steps - 1e-3).ceil().clamp(1, self.steps) / self.steps

    def on_grid(self, t: Tensor) -> Tensor:
        return (t * self.steps).round() / self.steps

    def timestep(self, t: Tensor) -> Tensor:
        return t * self.steps - 1

    def _at(self, t: Tensor) -> Tensor:
        position = t.double() * self.steps
        below = position.floor().clamp(0, self.steps - 1).long()
        table = self.log_alpha_bar.to(t.device)
        low, high = table[below], table[below + 1]
        return low + (position - below) * (high - low)


class Flow(Schedule):
    """The straight line alpha = 1 - t, sigma = t (Lipman et al. 2023; Liu et al. 2023)."""

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        return 1 - t, t


def linear(*, steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> Tabled:
    """DDPM's betas: evenly spaced from `start` to `end` (Ho et al. 2020, section 4)."""
    return Tabled(torch.linspace(start, end, steps, dtype=torch.float64))


def scaled_linear(*, steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> Tabled:
    """Stable Diffusion's betas: square roots evenly spaced (Rombach et al. 2022, their code)."""
    roots = torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64)
    return Tabled(roots.square())


def cosine(*, steps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> Tabled:
    """alpha^2 falls as a squared cosine (Nichol and Dhariwal 2021, equation 17).

    `max_beta` caps the last beta, which would be 1: no noise level is without any signal.
    """
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    alpha_bar = ((t + offset) / (1 + offset) * math.pi / 2).cos().square()
    return Tabled((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta))


def expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient () or (B,) shaped to multiply `x` (B, ...)."""
    return coefficient.reshape(-1, *[1] * (x.ndim - 1)).to(x.device)
