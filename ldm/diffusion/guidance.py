"""Guidance: a denoiser out of a conditional denoiser; it knows no network and guides all channels.

Shapes: B batch, C latent channels, h w latent grid.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.condition import Condition

Denoise = Callable[[Tensor, Tensor], Tensor]  # x_t (B, C, h, w), t () or (B,) -> x0_hat
DenoiseWith = Callable[[Tensor, Tensor, Condition], Tensor]


class ClassifierFree:
    """Away from the unconditional answer, towards the conditional one (Ho and Salimans 2022).

    x0_hat = uncond + scale (cond - uncond); scale 1 is the plain conditional model and costs half.
    x0_hat is an affine function of whatever the network predicts, so that this equals guiding eps.
    """

    def __init__(self, *, scale: float = 5.0) -> None:
        self.scale = scale

    def __call__(self, denoise: DenoiseWith, cond: Condition, uncond: Condition) -> Denoise:
        if self.scale == 1:
            return lambda x_t, t: denoise(x_t, t, cond)
        both = uncond.cat(cond)

        def guided(x_t: Tensor, t: Tensor) -> Tensor:
            t = t if t.ndim == 0 else torch.cat([t, t])
            x0_uncond, x0_cond = denoise(torch.cat([x_t, x_t]), t, both).chunk(2)
            return torch.lerp(x0_uncond, x0_cond, self.scale)

        return guided
