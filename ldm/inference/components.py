"""Components: the networks and the mathematics of one run."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ldm.diffusion.objective import Objective
from ldm.diffusion.tasks.base import Task
from ldm.utils.hashing import hash_module


@dataclass(frozen=True, eq=False)
class Components:
    """All that training and sampling of one model have in common; the modules are not copied."""

    denoiser: nn.Module
    autoencoder: nn.Module
    text_encoder: nn.Module
    style_encoder: nn.Module | None
    objective: Objective
    task: Task
    known_digests: Mapping[str, str] = field(default_factory=dict)  # of parts that are not built

    def hash_frozen(self, name: str) -> str:
        """The digest of a frozen module, by its group name."""
        return self.known_digests.get(name) or hash_module(self.frozen[name])

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
