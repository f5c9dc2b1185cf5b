"""A Gaussian mixture with its ideal denoiser in closed form: the truth samplers must reach."""

import torch
from scipy.stats import ks_2samp
from torch import Tensor

MEANS = torch.tensor([[1.5, 0.0], [-1.0, 1.2], [-0.5, -1.4]], dtype=torch.float64)
STD = 0.3
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def draw(n: int, generator: torch.Generator) -> Tensor:
    """Samples (n, 2, 1, 1) of the mixture itself."""
    component = torch.multinomial(WEIGHTS, n, replacement=True, generator=generator)
    noise = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return (MEANS[component] + STD * noise)[:, :, None, None]


def ideal_denoiser(schedule):
    """x_t, t -> E[x0 | x_t]: posterior over components, then each component's linear estimate."""

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule(t)
        x = x_t[:, :, 0, 0]  # (B, 2)
        var = alpha**2 * STD**2 + sigma**2
        distance = (x[:, None] - alpha * MEANS).square().sum(-1)  # (B, 3)
        posterior = torch.softmax(WEIGHTS.log() - distance / (2 * var), dim=-1)
        residual = x[:, None] - alpha * MEANS  # (B, 3, 2)
        means = MEANS + alpha * STD**2 / var * residual
        return (posterior[:, :, None] * means).sum(1)[:, :, None, None]

    return denoise


def agreement(samples: Tensor, n: int = 4000) -> float:
    """The smallest p value of two-sample tests along eight directions."""
    truth = draw(n, torch.Generator().manual_seed(11))
    p_values = []
    for angle in torch.arange(8) * torch.pi / 8:
        axis = torch.stack([angle.cos(), angle.sin()]).double()
        project = [(part[:, :, 0, 0] @ axis).numpy() for part in (samples, truth)]
        p_values.append(ks_2samp(*project).pvalue)
    return min(p_values)
