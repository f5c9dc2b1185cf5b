"""What a network computes from a text alone, once in a sampling process."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ldm.diffusion.conditioning import Condition
from ldm.diffusion.guidance.base import ConditionalDenoiser


class TextProjection:
    """A denoiser whose network gets the keys and values of each text as `cond.projected`.

    These depend on no timestep, and live as long as the text states that guidance holds.
    """

    def __init__(
        self, denoise: ConditionalDenoiser, project: Callable[[Tensor], Tensor | None]
    ) -> None:
        self.denoise, self.project = denoise, project
        self.projected = WeakTensorKeyDictionary()

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """x0_hat (B, C, h, w)."""
        if cond.tokens is None:
            return self.denoise(x_t, t, cond)
        if cond.tokens not in self.projected:
            with torch.no_grad():  # a guidance by gradients calls this, too
                self.projected[cond.tokens] = self.project(cond.tokens)
        return self.denoise(x_t, t, replace(cond, projected=self.projected[cond.tokens]))


def project_text_once(denoise: ConditionalDenoiser, network: nn.Module) -> ConditionalDenoiser:
    """`denoise` with a TextProjection, where the network has a `project_text`; see `Denoiser`."""
    project = getattr(network, "project_text", None)
    return denoise if project is None else TextProjection(denoise, project)
