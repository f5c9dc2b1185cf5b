"""The order of training samples: a pure function of (seed, position).

Position p counts the samples over all ranks and epochs: with N samples it is in epoch p // N. There
is no other state, so a run resumes at a position on any number of ranks and workers.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

# First key of each stream of random numbers of this package.
ORDER_STREAM, CROP_STREAM, CAPTION_STREAM, SUBSET_STREAM, PROMPT_STREAM = 1, 2, 3, 4, 5

_CACHED_EPOCHS = 2  # workers read around the end of an epoch


def draw_random_bits(count: int, *key: int) -> np.ndarray:
    """Returns `count` independent uint64 of a key (Philox, Salmon et al. 2011).

    These are raw bits because numpy's shuffles change from version to version.
    """
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(count)


def draw_caption_number(
    count: int, weights: Sequence[float] | None, *, seed: int, epoch: int, index: int
) -> int:
    """Returns which of a sample's captions is read in an epoch; weights: None for equal ones."""
    if count == 1:
        return 0
    bits = draw_random_bits(1, CAPTION_STREAM, seed, epoch, index)[0]
    if weights is None:
        return int(bits % count)
    ends = np.cumsum(weights)  # the last of them, for bits / 2^64 may round to 1
    return int(np.searchsorted(ends[:-1], bits / 2.0**64 * ends[-1], side="right"))


def draw_crop_and_flip(seed: int, position: int) -> tuple[float, float, float]:
    """Returns x and y of a random crop and the number that decides a flip, in [0, 1] each."""
    return tuple(draw_random_bits(3, CROP_STREAM, seed, position) / 2.0**64)


def split_batch(batch: int, world: int, accumulate: int) -> int:
    """Returns the images of one rank and micro-step; ValueError if they do not divide."""
    parts = world * accumulate
    if batch < 1 or batch % parts:
        below = batch // parts * parts
        near = " or ".join(str(n) for n in (below, below + parts) if n > 0)
        raise ValueError(
            f"data.batch_size={batch} is the batch of an optimizer step: it must be a multiple of "
            f"{parts} ({world} devices x {accumulate} accumulated), so {near}"
        )
    return batch // parts


class SampleOrder(Protocol):
    """An endless order of samples; window: how many shards are in use at a time, about."""

    window: int

    def at(self, position: int) -> tuple[int, int]:
        """Returns (epoch, sample index in 0..N-1) of a position >= 0."""
        ...

    def shards_from(self, position: int) -> Iterator[tuple[int, int]]:
        """Yields (position from which it is no longer needed, shard) in order of use, endlessly."""
        ...

    def rules(self) -> dict[str, object]:
        """Returns what decides about the order beside the samples, the seed and the window."""
        ...


class ShuffledOrder:
    """The endless sequence of shuffled epochs over shards of the given sizes.

    Each epoch shuffles the shards, then the samples within each `window` of consecutive shards, so
    that reads stay local. Every `group` of consecutive samples of a shard stays together.
    Each `number` has random numbers of its own.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        *,
        seed: int,
        window: int = 4,
        group: int = 1,
        number: int = 0,
    ) -> None:
        if sum(shard_sizes) == 0:
            raise ValueError("cannot order 0 samples")
        if window < 1:
            raise ValueError(f"the shuffle window must be 1 shard or more, got {window}")
        if group < 1:
            raise ValueError(f"a group must be 1 sample or more, got {group}")
        self._ends = np.cumsum(shard_sizes)
        self.window = window
        self._seed, self._group, self._number = seed, group, number
        self._epochs: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """N, the samples of an epoch."""
        return int(self._ends[-1])

    def at(self, position: int) -> tuple[int, int]:
        """Returns (epoch, sample index in 0..N-1) of a position >= 0."""
        epoch, offset = divmod(position, len(self))
        return epoch, int(self._get_permutation(epoch)[offset])

    def shards_from(self, position: int) -> Iterator[tuple[int, int]]:
        """Yields (position from which it is no longer needed, shard) in order of use, endlessly.

        It begins with the shards of the window in use at `position`.
        """
        sizes = np.diff(self._ends, prepend=0)
        epoch = position // len(self)
        while True:
            end = epoch * len(self)
            for window in self._split_into_windows(epoch):
                end += int(sizes[window].sum())
                if end > position:
                    yield from ((end, int(shard)) for shard in window if sizes[shard])
            epoch += 1

    def rules(self) -> dict[str, object]:
        return {}

    def _split_into_windows(self, epoch: int) -> list[np.ndarray]:
        count = len(self._ends)
        shards = np.argsort(self._draw(count, epoch), kind="stable")
        return [shards[first : first + self.window] for first in range(0, count, self.window)]

    def _draw(self, count: int, epoch: int) -> np.ndarray:
        """Returns the first random bits of an epoch: one for each shard, then for each sample."""
        number = [self._number] if self._number else []
        return draw_random_bits(count, ORDER_STREAM, self._seed, epoch, *number)

    def _get_permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            if len(self._epochs) == _CACHED_EPOCHS:
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[epoch] = self.permute(epoch)
        return self._epochs[epoch]

    def permute(self, epoch: int) -> np.ndarray:
        """Returns the samples (N,) of an epoch in their order."""
        count = len(self._ends)
        bits = self._draw(count + len(self), epoch)
        starts = np.concatenate([[0], self._ends])
        permutation, used = [], count
        for window in self._split_into_windows(epoch):
            samples = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in window])
            within = np.concatenate([np.arange(starts[s + 1] - starts[s]) for s in window])
            leaders = np.arange(len(samples)) - within % self._group
            ranks = bits[used + leaders]
            permutation.append(samples[np.argsort(ranks, kind="stable")])
            used += len(samples)
        return np.concatenate(permutation)


class PositionBatchSampler:
    """This rank's endless share of the order, as a batch sampler of (sample index, position).

    A micro-step takes the next batch * world positions, rank r the r-th slice of `batch` of them.
    Each pass begins at `start()`; `on_position` gets the first position of each batch before it.
    """

    def __init__(
        self,
        order: SampleOrder,
        *,
        batch: int,
        rank: int,
        world: int,
        start: Callable[[], int],
        on_position: Callable[[int], None] = lambda position: None,
    ) -> None:
        if batch < 1 or not 0 <= rank < world:
            raise ValueError(f"need batch >= 1 and 0 <= rank < world, got {batch}, {rank}, {world}")
        self._order, self._start, self._on_position = order, start, on_position
        self._batch, self._rank, self._world = batch, rank, world

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self._start() + self._rank * self._batch
        while True:
            self._on_position(first)
            yield [(self._order.at(p)[1], p) for p in range(first, first + self._batch)]
            first += self._batch * self._world


def split_strided_batches(
    count: int, *, batch: int, rank: int, world: int, kinds: np.ndarray | None = None
) -> list[list[tuple[int, int]]]:
    """Returns a rank's share of samples 0..count-1 for validation, as (index, position = index).

    Nothing is padded: the last batch, and a rank's total, may be smaller. kinds (N,): numbers, of
    which a batch has one; samples come in their order.
    """
    if kinds is None:
        kinds = np.zeros(count, int)
    indices = np.argsort(kinds[:count], kind="stable")[rank::world]
    parts = np.split(indices, np.flatnonzero(np.diff(kinds[indices])) + 1)
    batches = [part[b : b + batch].tolist() for part in parts for b in range(0, len(part), batch)]
    return [[(i, i) for i in indices] for indices in batches]
