"""Components: the networks and the mathematics of one run."""

from dataclasses import dataclass

import torch
from torch import nn

from ldm.diffusion.objective import Objective
from ldm.diffusion.tasks.base import Task


@dataclass(frozen=True, eq=False)
class Components:
    """All that training and sampling of one model have in common; the modules are not copied."""

    denoiser: nn.Module
    autoencoder: nn.Module
    text_encoder: nn.Module
    style_encoder: nn.Module | None
    objective: Objective
    task: Task

    @property
    def frozen(self) -> dict[str, nn.Module]:
        """The modules that the denoiser's training does not change, by group name."""
        named = {"autoencoder": self.autoencoder, "text_encoder": self.text_encoder}
        if self.style_encoder is not None:
            named["style_encoder"] = self.style_encoder
        return named

    @property
    def device(self) -> torch.device:
        """The device of the denoiser."""
        return next(self.denoiser.parameters()).device

    def to(self, device: torch.device) -> "Components":
        """These components, with all of their modules moved to `device`."""
        for module in (self.denoiser, self.objective, *self.frozen.values()):
            module.to(device)
        return self
