"""How a checkpoint gets to the disk: Lightning's plugin, and a writer that may use a thread."""

import math
import shutil
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor

from ldm.training.callbacks.best_checkpoints import BestCheckpoints
from ldm.utils.checkpoint_file import (
    count_tensor_bytes,
    delete_checkpoint,
    export_weights,
    find_last_good_checkpoint,
    link_last_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    write_checkpoint,
)

SMALL_COPY = 2**28  # bytes; those of model=nano are 110 MiB
# Of these exact types: a subclass, as numpy's numbers are, would be stored as an object.
CHECKPOINT_TYPES = (str, bytes, bool, int, float, complex, type(None))
# The entries of a checkpoint that a run needs; others are of callbacks.
RUN_STATE_KEYS = {"state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "ldm"}


class SafeCheckpointIO(CheckpointIO):
    """Lightning's access to `ldm.utils.checkpoint_file`: verified files without pickled objects.

    What a user's callback stores must be tensors and plain values: anything else is left out, with
    one warning. storage_options: a function of payload and path that replaces `write_checkpoint`.
    """

    def __init__(self) -> None:
        self.warned: set[str] = set()

    def save_checkpoint(
        self, checkpoint: dict, path, storage_options: Callable[[dict, Path], None] | None = None
    ) -> None:
        for name in self._find_objects(checkpoint.get("callbacks", {}), "the state of callback {}"):
            del checkpoint["callbacks"][name]
        for name in self._find_objects(checkpoint, "the entry '{}' of a callback"):
            del checkpoint[name]
        (storage_options or write_checkpoint)(checkpoint, Path(path))

    def _find_objects(self, states: dict, what: str) -> list[str]:
        """Returns the keys of what a checkpoint cannot hold; warns once of each."""
        found = {
            name: kind
            for name, state in states.items()
            if name not in RUN_STATE_KEYS and (kind := find_object(state)) is not None
        }
        for name in found.keys() - self.warned:
            warnings.warn(
                f"{what.format(name)} holds a {found[name]}: it is not saved, and a resumed run "
                "begins without it. A checkpoint holds tensors, numbers, texts, lists and "
                "dictionaries of these",
                stacklevel=2,
            )
        self.warned |= found.keys()
        return list(found)

    def load_checkpoint(self, path, map_location=None, weights_only: bool | None = None) -> dict:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path) -> None:
        delete_checkpoint(Path(path))


@dataclass(kw_only=True)
class CheckpointWriter:
    """Writes checkpoints, turns last.ckpt and best.ckpt to them, and deletes the older ones."""

    folder: Path
    keep: int  # the number of newest checkpoints that stay, besides `best`
    best: BestCheckpoints
    background: bool | Literal["auto"]  # a thread writes a copy in host memory
    weights: bool  # each save also writes weights/step=*.safetensors
    thread: threading.Thread | None = None
    error: BaseException | None = None  # of the last save, until `wait` reports it
    problem: str | None = None  # why the last save failed for lack of space or rights
    doubtful_from: int | None = None
    pool: dict[str, Tensor] = field(default_factory=dict)

    @property
    def is_busy(self) -> bool:
        """Returns whether a save is under way."""
        return self.thread is not None and self.thread.is_alive()

    def save(self, payload: dict, path: Path) -> None:
        """Writes a checkpoint, or starts to; Lightning calls it on rank 0."""
        self.wait()
        if self.background == "auto":
            self._choose_background(payload)
        if self.background:
            payload = copy_to_host(payload, self.pool)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        self.doubtful_from = payload["ldm"].get("doubtful_from")
        self._start(payload, path)

    def save_best(self, path: Path) -> None:
        """Records a checkpoint that is already written as one of the best."""
        self.wait()
        self._start(None, path)

    def wait(self) -> None:
        """Waits for the save that is under way, and warns if it failed.

        An error other than OSError is raised.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        error, self.error = self.error, None
        if error is None:
            return
        if not isinstance(error, OSError):
            raise error
        self.best.cancel()
        good = find_last_good_checkpoint(self.folder) or "none yet"
        free = shutil.disk_usage(self.folder).free if self.folder.is_dir() else 0
        self.problem = (
            f"saving {self.path} failed ({error.strerror or error}): it takes "
            f"{self.needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free. The last good "
            f"checkpoint is {good}"
        )
        warnings.warn(f"{self.problem}; the training goes on", stacklevel=2)

    def _choose_background(self, payload: dict) -> None:
        size = count_tensor_bytes(payload)
        device = next(iter(payload["state_dict"].values())).device
        # strategy=fsdp gathers the state of GPUs in the host's memory.
        on_cpu = device.type == "cpu" and not torch.cuda.is_available()
        self.background = has_memory_for_copy(
            size, on_cpu=on_cpu, available=read_available_memory()
        )
        if size > SMALL_COPY:
            how, other = "in the foreground, without a copy", "true writes a copy while the"
            if self.background:
                how, other = "from a copy in the host's memory", "false makes none, and the"
            print(
                f"a checkpoint of {size / 2**30:.1f} GiB is written {how}: checkpoint.background="
                f"{other} training {'waits' if self.background else 'goes on'}",
                flush=True,
            )

    def _start(self, payload: dict | None, path: Path) -> None:
        self.problem, self.path = None, path
        self.needed = count_tensor_bytes(payload or {})
        if self.background:
            self.thread = threading.Thread(target=self._write, args=(payload, path), daemon=True)
            self.thread.start()
        else:
            self._write(payload, path)
            self.wait()

    def _write(self, payload: dict | None, path: Path) -> None:
        try:
            if payload is not None:
                write_checkpoint(payload, path)
                link_last_checkpoint(path)
            self.best.commit()
            spare = self.best.values
            prune_checkpoints(self.folder, self.keep, spare=spare, doubtful_from=self.doubtful_from)
            if self.weights and payload is not None:
                name = f"{path.stem}.safetensors"
                export_weights(payload, self.folder.parent / "weights" / name)
        except BaseException as error:
            self.error = error


def has_memory_for_copy(size: int, *, on_cpu: bool, available: float) -> bool:
    """Returns whether a copy of `size` bytes of state is small in the host's memory.

    on_cpu: the state is in this memory, too, and is most of what the training takes. available:
    bytes, of which the copy of a GPU's state may take half.
    """
    return size <= SMALL_COPY or (not on_cpu and size <= available / 2)


def read_available_memory() -> float:
    """Returns the bytes of the host's memory that are available; infinity if it does not say."""
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:  # macOS
        return math.inf
    return 1024 * int(meminfo.partition("MemAvailable:")[2].split()[0])


def find_object(value: object) -> str | None:
    """Returns the type of the first part that is no tensor and no plain value; None without one."""
    kind = type(value)
    if kind in CHECKPOINT_TYPES or isinstance(value, Tensor):
        return None
    if kind not in (dict, OrderedDict, list, tuple):
        return f"{kind.__module__}.{kind.__qualname__}"
    parts = [*value, *value.values()] if isinstance(value, dict) else value
    return next((found for part in parts if (found := find_object(part))), None)


def copy_to_host(
    value: object, pool: dict[str, Tensor], at: str = "", done: dict | None = None
) -> object:
    """Returns a copy of a checkpoint's state in host memory.

    The tensors of `pool`, by their path in the state, are reused: fresh memory costs five times as
    much as the copy. Copies from a device may be incomplete on return. done: the copies so far, so
    that weights which two networks share have one copy.
    """
    done = {} if done is None else done
    if isinstance(value, Tensor):
        like = (value.shape, value.dtype, value.stride())
        source = (value.data_ptr() or id(value), *like)  # a tensor of a subclass may have none
        if source in done:
            return done[source]
        to = pool.get(at)
        if to is None or (to.shape, to.dtype, to.stride()) != like:
            to = pool[at] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        done[source] = to.copy_(value.detach(), non_blocking=True)
        return to
    if isinstance(value, dict):
        same = copy(value)  # an OrderedDict remains one
        parts = {k: copy_to_host(part, pool, f"{at}/{k}", done) for k, part in value.items()}
        same.update(parts)
        return same
    if isinstance(value, list | tuple):
        parts = enumerate(value)
        return type(value)(copy_to_host(part, pool, f"{at}/{i}", done) for i, part in parts)
    return value
