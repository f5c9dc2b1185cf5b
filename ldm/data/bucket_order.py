"""The order of batches that have one bucket each, over one or several weighted data sets.

Shapes: N samples, B buckets, M batches of an epoch.
"""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cached_property

import numpy as np

from ldm.data.position_sampler import ShuffledOrder
from ldm.utils.hashing import hash_bytes

MAX_REPEATED_SAMPLES = 10**8  # that a weight above 1 makes an epoch take from a data set
_CACHED_EPOCHS = 2  # workers read around the end of an epoch


class BucketedOrder:
    """The endless sequence of batches, each of samples of one bucket.

    An epoch takes the samples of ShuffledOrder's epoch one after another, each to the batch of its
    bucket. A batch comes when it is full; what does not fill one is carried to the next epoch.

    bucket (N,): number of each sample's bucket; batch: images of an optimizer step; window, group:
    see `ShuffledOrder`. data_sets: number of shards and weight of each data set, one after another.
    A data set with n samples of a bucket has its own endless order of them, of which an epoch takes
    the next weight * n; data sets come evenly mixed.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        bucket: np.ndarray,
        *,
        batch: int,
        seed: int,
        window: int = 4,
        group: int = 1,
        data_sets: Sequence[tuple[int, float]] | None = None,
    ) -> None:
        if len(bucket) != sum(shard_sizes):
            raise ValueError(f"{len(bucket)} buckets for {sum(shard_sizes)} samples")
        data_sets = data_sets or [(len(shard_sizes), 1.0)]
        shards = np.cumsum([0, *(count for count, _ in data_sets)])
        if shards[-1] != len(shard_sizes):
            raise ValueError(f"data sets of {shards[-1]} shards, but there are {len(shard_sizes)}")
        self._batch, self._ends = batch, np.cumsum(shard_sizes)
        self._count = int(bucket.max()) + 1
        self._sets = []
        for number, (first, end) in enumerate(itertools.pairwise(shards)):
            sizes = shard_sizes[first:end]
            begin = sum(shard_sizes[:first])
            order = ShuffledOrder(sizes, seed=seed, window=window, group=group, number=number)
            own = bucket[begin : begin + len(order)].astype(np.min_scalar_type(self._count))
            weight = Fraction(str(data_sets[number][1]))
            if weight > 1 and weight * len(order) > MAX_REPEATED_SAMPLES:
                raise ValueError(
                    f"the weight {float(weight):g} of a data set of {len(order)} samples makes an "
                    f"epoch of more than {MAX_REPEATED_SAMPLES:,}: give the others smaller weights"
                )
            self._sets.append(_WeightedSet(order, begin, own, self._count, weight))
        if sum(one.weight * len(one.order) for one in self._sets) < 1:
            raise ValueError("the weights make an epoch of less than one sample: give larger ones")
        self._window_share = window / len(shard_sizes)
        self.window = min(len(shard_sizes), window + (self._count - 1) * batch)
        self._plans: dict[int, np.ndarray] = {}
        self._carried: dict[int, list[np.ndarray]] = {}
        self._current = range(0), 0  # numbers of the batches of an epoch, and the epoch

    def __len__(self) -> int:
        """The samples that an epoch takes."""
        return sum(self._count_taken(1))

    def at(self, position: int) -> tuple[int, int]:
        """Returns (epoch, sample index in 0..N-1) of a position >= 0."""
        number, place = divmod(position, self._batch)
        batches, epoch = self._find_epoch(number)
        return epoch, int(self._get_plan(epoch)[number - batches.start, place])

    def shards_from(self, position: int) -> Iterator[tuple[int, int]]:
        """Yields (position from which it is no longer needed, shard) in order of use, endlessly.

        A shard of which no sample comes for as long as a window takes is yielded again before the
        next one, as are those of samples that were carried.
        """
        _, epoch = self._find_epoch(position // self._batch)
        while True:
            first = self._count_batches(epoch)
            for end, shard in self._find_uses(epoch):
                if (first + end) * self._batch > position:
                    yield (first + end) * self._batch, shard
            epoch += 1

    def rules(self) -> dict[str, object]:
        """Returns the batch, and a digest of the bucket of each sample and of the weights."""
        return {"order": {"batch": self._batch, "buckets": self._digest}}

    @cached_property
    def _digest(self) -> str:
        shares = [(len(one.order), str(one.weight)) for one in self._sets]
        buckets = [one.bucket.astype("<i4").tobytes() for one in self._sets]
        return hash_bytes(json.dumps(shares).encode(), *buckets)[:16]

    def _find_uses(self, epoch: int) -> list[tuple[int, int]]:
        """Returns (batch after the last, shard) of an epoch's uses of shards, in order."""
        plan = self._get_plan(epoch)
        gap = max(1, math.ceil(len(plan) * self._window_share))
        shard = np.searchsorted(self._ends, plan, side="right")
        uses = np.unique(shard * len(plan) + np.arange(len(plan))[:, None])
        shard, row = np.divmod(uses, max(len(plan), 1))
        begins = np.diff(uses, prepend=-gap - 1) > gap
        begins |= np.diff(shard, prepend=-1) > 0
        first = np.flatnonzero(begins)
        last = np.append(first[1:], len(uses))[: len(first)] - 1
        order = np.argsort(row[first], kind="stable")
        ends, shards = row[last][order] + 1, shard[first][order]
        return list(zip(ends.tolist(), shards.tolist(), strict=True))

    def _count_taken(self, epochs: int) -> list[int]:
        """Returns how many samples of each bucket the first epochs take."""
        taken = [one.count(epochs) for one in self._sets]
        return [sum(counts) for counts in zip(*taken, strict=True)]

    def _count_batches(self, epochs: int) -> int:
        """Returns how many batches the first epochs have."""
        return sum(taken // self._batch for taken in self._count_taken(epochs))

    def _find_epoch(self, number: int) -> tuple[range, int]:
        """Returns the numbers of the batches of the epoch of a batch, and the epoch."""
        batches, epoch = self._current
        if number not in batches:
            per_epoch = sum(one.weight * len(one.order) for one in self._sets)
            epoch = math.floor(number * self._batch / per_epoch)  # not later: some may be carried
            while (end := self._count_batches(epoch + 1)) <= number:
                epoch += 1
            self._current = batches, epoch = range(self._count_batches(epoch), end), epoch
        return batches, epoch

    def _get_plan(self, epoch: int) -> np.ndarray:
        if epoch not in self._plans:
            for kept in (self._plans, self._carried):
                if len(kept) == _CACHED_EPOCHS:
                    kept.pop(next(iter(kept)))
            self._plans[epoch] = self._make_plan(epoch)
        return self._plans[epoch]

    def _make_plan(self, epoch: int) -> np.ndarray:
        """Returns the samples (M, batch) of an epoch's batches."""
        carried = self._carried.get(epoch) or self._look_back(epoch)
        batches, times, left = [], [], []
        for before, (samples, when) in zip(carried, self._walk(epoch), strict=True):
            samples = np.concatenate([before, samples])
            full = len(samples) // self._batch
            batches.append(samples[: full * self._batch].reshape(full, self._batch))
            times.append(when[self._batch * np.arange(1, full + 1) - 1 - len(before)])
            left.append(samples[full * self._batch :].copy())
        self._carried[epoch + 1] = left
        return np.concatenate(batches)[np.argsort(np.concatenate(times), kind="stable")]

    def _look_back(self, epoch: int) -> list[np.ndarray]:
        """Returns the samples of each bucket that the epochs before this one have left over."""
        wanted = [taken % self._batch for taken in self._count_taken(epoch)]
        carried: list[list[np.ndarray]] = [[] for _ in wanted]
        while any(wanted):
            epoch -= 1
            for b, (samples, _) in enumerate(self._walk(epoch)):
                found = samples[max(len(samples) - wanted[b], 0) :]
                carried[b].insert(0, found)
                wanted[b] -= len(found)
        none = np.empty(0, np.min_scalar_type(int(self._ends[-1])))
        return [np.concatenate([none, *found]) for found in carried]

    def _walk(self, epoch: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns the samples of each bucket that an epoch takes, in order, and when."""
        pieces: list[list] = [[] for _ in range(self._count)]
        for one in self._sets:
            one.take(epoch, pieces)
        dtype = np.min_scalar_type(int(self._ends[-1]))
        walks = []
        for found in pieces:
            samples, times = (np.concatenate(parts) for parts in zip(*found, strict=True))
            if len(self._sets) > 1:
                order = np.argsort(times, kind="stable")
                samples, times = samples[order], times[order]
            walks.append((samples.astype(dtype), times))
        return walks


class _WeightedSet:
    """A data set of which an epoch takes `weight` times the samples of each bucket."""

    def __init__(
        self, order: ShuffledOrder, first: int, bucket: np.ndarray, count: int, weight: Fraction
    ) -> None:
        self.order, self.weight = order, weight
        self._first, self.bucket = first, bucket
        self._counts = np.bincount(bucket, minlength=count).tolist()

    def count(self, epochs: int) -> list[int]:
        """Returns how many samples of each bucket the first epochs take."""
        share, whole = self.weight.as_integer_ratio()
        return [epochs * share * count // whole for count in self._counts]

    def take(self, epoch: int, pieces: list[list]) -> None:
        """Adds (samples, times in 0..1) of an epoch to those of each bucket."""
        begins, ends = self.count(epoch), self.count(epoch + 1)
        for own in range(math.floor(epoch * self.weight), math.ceil((epoch + 1) * self.weight)):
            walk = self.order.permute(own)
            places = np.argsort(self.bucket[walk], kind="stable")
            samples = walk[places] + self._first
            times = (float(own - epoch * self.weight) + places / len(walk)) / float(self.weight)
            start = 0
            for b, count in enumerate(self._counts):
                low, high = (min(max(x[b] - own * count, 0), count) for x in (begins, ends))
                pieces[b].append(
                    (samples[start + low : start + high], times[start + low : start + high])
                )
                start += count
