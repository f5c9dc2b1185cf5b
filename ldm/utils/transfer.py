"""Copies to a device that the host does not wait for."""

import torch
from torch import Tensor


def send(value: Tensor, device: torch.device | str) -> Tensor:
    """Returns a tensor of the host on `device`; to a GPU it is copied out of pinned memory."""
    device = torch.device(device)
    if device.type == "cuda" and value.device.type == "cpu":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)
