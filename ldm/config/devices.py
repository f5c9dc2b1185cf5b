"""Which device a command works on. Of all that is heavy this imports torch alone."""

import torch

from ldm.utils.errors import UsageError


def select_device(name: str | None) -> torch.device:
    """The device of this name; without one a GPU where there is one.

    Raises UsageError where there is no such device.
    """
    has_gpu = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if has_gpu else "cpu"))
        if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
            raise ValueError
        torch.empty(1, device=device)
    except (RuntimeError, TypeError, ValueError, AssertionError, NotImplementedError) as error:
        here = "cpu, cuda" if has_gpu else "cpu"
        raise UsageError(f"device={name} is not here: take one of {here}") from error
    return device
