"""What a checkpoint holds: copied from a device, and adapted to how a run goes on."""

from collections.abc import Callable
from copy import copy
from pathlib import Path

import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor

from ldm.utils.checkpoint_file import delete_checkpoint, read_checkpoint, write_checkpoint


class SafeCheckpointIO(CheckpointIO):
    """Lightning's door to `ldm.utils.checkpoint_file`: verified files, and no pickled objects.

    `storage_options` is a function of payload and path that stores them in place of `files.write`.
    """

    def save_checkpoint(
        self, checkpoint: dict, path, storage_options: Callable[[dict, Path], None] | None = None
    ) -> None:
        (storage_options or write_checkpoint)(checkpoint, Path(path))

    def load_checkpoint(self, path, map_location=None, weights_only: bool | None = None) -> dict:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path) -> None:
        delete_checkpoint(Path(path))


def reset_loop_progress(loops: dict, batches: int) -> None:
    """Have Lightning's loops go on after so many micro-steps, with no validation under way.

    They count micro-steps and not steps: where a step had another number of them, the next would
    be cut short, and the run's end come too early. A validation that is owed begins anew, where
    they would leave out as many of its batches as the one before had.
    """
    progress = loops["epoch_loop.batch_progress"]
    for count in (progress["total"], progress["current"]):
        ended = batches - (count["processed"] - count["completed"])
        count.update(dict.fromkeys(count, batches), completed=ended)
    validation = loops["epoch_loop.val_loop.batch_progress"]
    for count in (validation["total"], validation["current"]):
        count.update(dict.fromkeys(count, 0))


def copy_to_host(value: object, pool: dict[str, Tensor], at: str = "") -> object:
    """A copy of a checkpoint's state in memory of the host.

    The tensors of `pool`, by place in the state, are used again: fresh memory costs the kernel
    five times what copying costs. Copies from a device may not be complete on return.
    """
    if isinstance(value, Tensor):
        to = pool.get(at)
        like = (value.shape, value.dtype, value.stride())
        if to is None or (to.shape, to.dtype, to.stride()) != like:
            to = pool[at] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return to.copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        same = copy(value)  # an OrderedDict remains one
        same.update({key: copy_to_host(part, pool, f"{at}/{key}") for key, part in value.items()})
        return same
    if isinstance(value, list | tuple):
        return type(value)(copy_to_host(part, pool, f"{at}/{i}") for i, part in enumerate(value))
    return value
