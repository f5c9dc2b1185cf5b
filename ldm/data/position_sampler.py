"""The order in which samples are seen: a pure function of (seed, position).

Position p counts samples over all ranks and epochs; with N samples it lies in epoch p // N. There
is no other state: to resume is to start at a position, on any number of ranks and workers.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

# First key of each stream of random numbers that this package draws.
ORDER_STREAM, CROP_STREAM, CAPTION_STREAM, SUBSET_STREAM, PROMPT_STREAM = 1, 2, 3, 4, 5

_CACHED_EPOCHS = 2  # around an epoch's end positions of both are asked for


def draw_random_bits(count: int, *key: int) -> np.ndarray:
    """`count` independent uint64 that depend on the key alone (Philox, Salmon et al. 2011).

    Raw bits, because numpy keeps those the same from version to version, unlike its shuffles.
    """
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(count)


class ShuffledOrder:
    """The endless concatenation of shuffled epochs over shards of the given sizes.

    In each epoch the shards are shuffled, then the samples inside each run of `window` shards, so
    that reads stay near one another. Without `shuffle` each epoch is 0, 1, .. N-1.
    Samples that lie side by side in groups of `group`, counted from a shard's first, stay so.
    Raises ValueError where there is no sample, or the window or group is empty.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        *,
        seed: int,
        window: int = 4,
        group: int = 1,
        shuffle: bool = True,
    ) -> None:
        if sum(shard_sizes) == 0:
            raise ValueError("cannot order 0 samples")
        if window < 1:
            raise ValueError(f"the shuffle window must be 1 shard or more, got {window}")
        if group < 1:
            raise ValueError(f"a group must be 1 sample or more, got {group}")
        self._ends = np.cumsum(shard_sizes)
        self.window = window
        self._seed, self._group, self._shuffle = seed, group, shuffle
        self._epochs: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """N, the samples of an epoch."""
        return int(self._ends[-1])

    def at(self, position: int) -> tuple[int, int]:
        """(epoch, sample index in 0..N-1) of a position >= 0."""
        epoch, offset = divmod(position, len(self))
        return epoch, int(self._permutation(epoch)[offset])

    def shards_from(self, position: int) -> Iterator[tuple[int, int]]:
        """(position from which on it is no longer needed, shard), in the order of use, endless.

        It begins with the shards of the window in use at `position`.
        """
        sizes = np.diff(self._ends, prepend=0)
        epoch = position // len(self)
        while True:
            end = epoch * len(self)
            shards = self._shard_order(epoch)
            for first in range(0, len(shards), self.window):
                window = shards[first : first + self.window]
                end += int(sizes[window].sum())
                if end > position:
                    yield from ((end, int(shard)) for shard in window if sizes[shard])
            epoch += 1

    def _shard_order(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(len(self._ends))
        bits = draw_random_bits(
            len(self._ends), ORDER_STREAM, self._seed, epoch
        )  # the first of `_shuffled`'s
        return np.argsort(bits, kind="stable")

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            if len(self._epochs) == _CACHED_EPOCHS:
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[epoch] = self._shuffled(epoch) if self._shuffle else np.arange(len(self))
        return self._epochs[epoch]

    def _shuffled(self, epoch: int) -> np.ndarray:
        count = len(self._ends)
        bits = draw_random_bits(count + len(self), ORDER_STREAM, self._seed, epoch)
        shards = self._shard_order(epoch)
        starts = np.concatenate([[0], self._ends])
        windows = []
        used = count
        for first in range(0, count, self.window):
            window = shards[first : first + self.window]
            samples = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in window])
            within = np.concatenate([np.arange(starts[s + 1] - starts[s]) for s in window])
            leaders = np.arange(len(samples)) - within % self._group
            ranks = bits[used + leaders]
            windows.append(samples[np.argsort(ranks, kind="stable")])
            used += len(samples)
        return np.concatenate(windows)


class PositionBatchSampler:
    """This rank's endless share of the order, as a batch sampler of (sample index, position).

    A micro-step takes the next batch * world positions, rank r the r-th slice of `batch` of them.
    Each pass begins at the position that `start()` gives at that moment; `on_position` is told the
    first position of every batch before it is given out.
    """

    def __init__(
        self,
        order: ShuffledOrder,
        *,
        batch: int,
        rank: int,
        world: int,
        start: Callable[[], int],
        on_position: Callable[[int], None] = lambda position: None,
    ) -> None:
        if batch < 1 or not 0 <= rank < world:
            raise ValueError(f"need batch >= 1 and 0 <= rank < world, got {batch}, {rank}, {world}")
        self._order, self._start, self._reached = order, start, on_position
        self._batch, self._rank, self._world = batch, rank, world

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self._start() + self._rank * self._batch
        while True:
            self._reached(first)
            yield [(self._order.at(q)[1], q) for q in range(first, first + self._batch)]
            first += self._batch * self._world


def split_strided_batches(
    count: int, *, batch: int, rank: int, world: int
) -> list[list[tuple[int, int]]]:
    """Rank's share of samples 0..count-1 for validation: each sample once over all ranks.

    Position is the index. Nothing is padded: the last batch, and a rank's total, may be smaller.
    """
    indices = range(rank, count, world)
    return [[(i, i) for i in indices[b : b + batch]] for b in range(0, len(indices), batch)]
