"""Whole batches, which worker processes decode into slots of shared memory.

Shapes: W workers, N slots of each, M bytes of the largest batch.
"""

import logging
import math
import shutil
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from ldm.data.dataset import Batch
from ldm.data.shards.reader import ShardReader

PREFETCH = 2  # batches that a worker of a DataLoader has under way, which is torch's own default
_SLOTS = PREFETCH + 2  # the others: the batch that the consumer has, and the one before it
_SHARED_MEMORY = Path("/dev/shm")
_log = logging.getLogger(__name__)


class SampleDataset(Protocol):
    """Samples by (index, position), whose bytes workers write into slots.

    tensor_name: the field of a batch with those bytes; most_bytes: of the largest sample.
    target_sizes (N, 2): height and width of each image; None: all have the same.
    epoch_length: positions for which a sample keeps its caption; None: N. gives_sizes: batches have
    `sizes`, see `Batch`.
    """

    tensor_name: str
    most_bytes: int
    target_sizes: np.ndarray | None
    epoch_length: int | None
    gives_sizes: bool
    shards: ShardReader

    def __len__(self) -> int: ...

    def read_batch(self, at: Sequence[tuple[int, int]], memory: Tensor | None = None) -> Batch:
        """Returns the samples at (index, position), written into bytes of `memory` if given."""

    def unpack(self, batch: Batch) -> Batch:
        """Converts bytes on the device to what the training reads."""

    def rules(self) -> dict[str, object]:
        """Returns what a checkpoint stores, so that the run resumes by the same rules."""

    def follow_rules(self, facts: Mapping[str, object]) -> None:
        """Takes the rules of a checkpoint."""


class BatchDataset(Dataset):
    """Batches of a data set, by lists of (index, position), for a DataLoader.

    slots (W, N, M): where workers put samples' bytes, in turn. A batch stays as it is until the
    loader has handed out two more: each makes the worker begin the batch `PREFETCH` after it.
    """

    def __init__(self, dataset: SampleDataset, slots: Tensor | None = None) -> None:
        self.dataset = dataset
        self.slots = slots
        self._used = 0
        self._is_pinned = False

    def __getitems__(self, at: Sequence[tuple[int, int]]) -> Batch | tuple:
        """Returns a batch, or the worker, the slot, its bytes' shape, and the other fields."""
        if self.slots is None:
            return self.dataset.read_batch(at)
        worker, slot = get_worker_info().id, self._used % _SLOTS
        self._used += 1
        batch = self.dataset.read_batch(at, self.slots[worker, slot])
        rows = batch.pop(self.dataset.tensor_name)
        return worker, slot, tuple(rows.shape), batch

    def open_batches(self, messages: Iterator) -> Iterator[dict]:
        """Yields the batches of the messages that a DataLoader received from its workers."""
        if self.slots is None:
            yield from messages
            return
        if torch.cuda.is_available() and not self._is_pinned:
            self._pin()
        name = self.dataset.tensor_name
        transfers = deque()
        for worker, slot, shape, fields in messages:
            rows = self.slots[worker, slot, : math.prod(shape)].view(shape)
            yield {**fields, name: rows}
            if self._is_pinned:  # the next message frees the slot of 2 W batches ago
                transfers.append(torch.cuda.current_stream().record_event())
                if len(transfers) == 2 * len(self.slots):
                    transfers.popleft().synchronize()

    def _pin(self) -> None:
        """Makes the slots page-locked, so that a GPU copies them while the run goes on."""
        runtime, address = torch.cuda.cudart(), self.slots.data_ptr()
        self._is_pinned = int(runtime.cudaHostRegister(address, self.slots.nbytes, 0)) == 0
        if not self._is_pinned:
            with suppress(RuntimeError):  # a launch takes the error, else the next CUDA call does
                torch.zeros(1, device="cuda")
        else:
            weakref.finalize(self, runtime.cudaHostUnregister, address).atexit = False


def allocate_slots(
    dataset: SampleDataset, *, batch: int, workers: int, ranks: int = 1
) -> Tensor | None:
    """Returns slots for so many workers, or None without workers or enough shared memory.

    ranks: the processes of this machine, each of which takes as much of its shared memory.
    """
    shape = (workers, _SLOTS, batch * dataset.most_bytes)
    size = math.prod(shape)
    if not size:
        return None
    needed = 2 * size * ranks  # for training and validation
    if _SHARED_MEMORY.is_dir() and needed > (free := shutil.disk_usage(_SHARED_MEMORY).free):
        _log.warning(
            "%s has %d MiB free; %d workers that decode batches of %d images in place need %d MiB, "
            "so they send copies, which is slower. Enlarge it (docker run --shm-size), or lower "
            "data.workers",
            *(_SHARED_MEMORY, free >> 20, workers * ranks, batch, -(-needed >> 20)),
        )
        return None
    if size >= 2**30:
        _log.info("%.1f GiB of shared memory hold batches of %d workers", size / 2**30, workers)
    return torch.zeros(shape, dtype=torch.uint8).share_memory_()  # the copy touches every page


def pass_batch(batch):
    """Returns a batch as it is, as the `collate_fn` of whole batches."""
    return batch
