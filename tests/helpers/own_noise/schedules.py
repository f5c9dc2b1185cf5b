"""A noise schedule that conf/ does not name."""

import types
from os import mkdir

import torch
from torch import Tensor

from ldm.diffusion.schedules import FlowSchedule, Schedule

lazy = types.ModuleType("lazy", "Of another package, which runs code when a name is looked up.")
lazy.__getattr__ = mkdir


class PowerSchedule(Schedule):
    """A straight line, of which the noise follows a power of the time."""

    def __init__(self, *, shift: float = 2.0) -> None:
        super().__init__()
        self.shift = abs(shift)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.to(torch.promote_types(t.dtype, torch.float32)) ** self.shift
        return 1 - t, t

    def timestep(self, t: Tensor) -> Tensor:
        return self(t)[1] * self.steps


def make_flow(**options: float) -> Schedule:
    """The schedule of flow matching."""
    return FlowSchedule(**options)
