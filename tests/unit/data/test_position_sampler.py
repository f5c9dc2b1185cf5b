from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.data.position_sampler import (
    PositionBatchSampler,
    ShuffledOrder,
    draw_random_bits,
    split_strided_batches,
)

sizes = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(sum)
seeds = st.integers(0, 2**64)


def epoch_of(order: ShuffledOrder, epoch: int) -> list[int]:
    n = len(order)
    seen = [order.at(p) for p in range(epoch * n, (epoch + 1) * n)]
    assert {e for e, _ in seen} == {epoch}
    return [index for _, index in seen]


@given(sizes, seeds, st.integers(1, 9), st.integers(0, 10**6))
def test_each_epoch_is_a_permutation(sizes, seed, window, epoch):
    order = ShuffledOrder(sizes, seed=seed, window=window)
    indices = epoch_of(order, epoch)
    assert sorted(indices) == list(range(sum(sizes)))


@given(sizes, seeds, st.integers(1, 9))
def test_a_window_of_shards_is_finished_before_the_next(sizes, seed, window):
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    shards = [shard_of[i] for i in epoch_of(ShuffledOrder(sizes, seed=seed, window=window), 0)]
    last = {s: max(p for p, q in enumerate(shards) if q == s) for s in set(shards)}
    for p, shard in enumerate(shards):
        open_shards = {s for s in shards[:p] if last[s] >= p} | {shard}
        assert len(open_shards) <= window


@given(sizes, seeds, st.integers(1, 9), st.integers(1, 5))
def test_groups_stay_together(sizes, seed, window, group):
    indices = epoch_of(ShuffledOrder(sizes, seed=seed, window=window, group=group), 3)
    assert sorted(indices) == list(range(sum(sizes)))
    starts = np.concatenate([[0], np.cumsum(sizes)])
    for start, size in zip(starts, sizes, strict=False):
        for first in range(start, start + size, group):
            members = list(range(first, min(first + group, start + size)))
            place = indices.index(first)
            assert indices[place : place + len(members)] == members


def test_groups_are_shuffled():
    leaders = epoch_of(ShuffledOrder([40, 40], seed=1, group=4), 0)[::4]
    assert leaders != sorted(leaders)
    assert max(abs(a - b) for a, b in pairwise(leaders)) > 40


@given(sizes, seeds, st.lists(st.integers(0, 500), max_size=20))
def test_positions_can_be_read_in_any_order(sizes, seed, positions):
    order = ShuffledOrder(sizes, seed=seed)
    assert [order.at(p) for p in positions] == [
        ShuffledOrder(sizes, seed=seed).at(p) for p in positions
    ]


@given(sizes, seeds, st.integers(1, 6), st.integers(1, 5), st.integers(0, 100), st.integers(1, 6))
def test_all_ranks_together_are_the_endless_stream(sizes, seed, batch, world, start, steps):
    order = ShuffledOrder(sizes, seed=seed)
    ranks = [
        PositionBatchSampler(order, batch=batch, rank=r, world=world, start=lambda: start)
        for r in range(world)
    ]
    taken = [list(islice(iter(rank), steps)) for rank in ranks]
    stream = [item for step in range(steps) for rank in taken for item in rank[step]]
    positions = range(start, start + steps * batch * world)
    assert stream == [(order.at(p)[1], p) for p in positions]


@given(st.integers(0, 6), st.sampled_from([(1, 12), (2, 6), (3, 4), (4, 3), (12, 1)]))
def test_a_run_goes_on_at_another_world_size(steps, shape):
    """12 samples a step, whatever ranks and micro-steps they are split into."""
    order, position = ShuffledOrder([5, 1, 7], seed=3), 0

    def take(world: int, batch: int, steps: int) -> list[list[int]]:
        ranks = [
            iter(
                PositionBatchSampler(
                    order, batch=batch, rank=r, world=world, start=lambda: position
                )
            )
            for r in range(world)
        ]
        return [[i for rank in ranks for i, _ in next(rank)] for _ in range(steps)]

    whole = take(1, 12, 10)
    position = 12 * steps
    assert take(*shape, 10 - steps) == whole[steps:]


def test_each_pass_begins_at_the_live_position():
    position = 0
    batches = PositionBatchSampler(
        ShuffledOrder([10], seed=0), batch=2, rank=1, world=2, start=lambda: position
    )
    assert [q for _, q in next(iter(batches))] == [2, 3]
    position = 40
    assert [q for _, q in next(iter(batches))] == [42, 43]


def test_epochs_and_seeds_differ():
    order = ShuffledOrder([50, 50], seed=1)
    assert epoch_of(order, 0) != epoch_of(order, 1)
    assert epoch_of(order, 0) != epoch_of(ShuffledOrder([50, 50], seed=2), 0)


def test_the_order_never_changes():
    """Written down once: another numpy or another machine must not change a resumed run."""
    assert epoch_of(ShuffledOrder([3, 2, 4], seed=7, window=2), 5) == [0, 4, 2, 3, 1, 6, 8, 5, 7]
    assert draw_random_bits(2, 1, 2, 3).tolist() == [13279728891206244966, 234311473967787377]


def test_shuffles_are_uniform():
    counts = np.zeros((4, 4))
    order = ShuffledOrder([2, 2], seed=0, window=2)
    for epoch in range(2000):
        for place, index in enumerate(epoch_of(order, epoch)):
            counts[place, index] += 1
    assert abs(counts / 2000 - 0.25).max() < 0.05


def test_bad_arguments_of_the_order_are_refused():
    with pytest.raises(ValueError, match="0 samples"):
        ShuffledOrder([0, 0], seed=0)
    with pytest.raises(ValueError, match="window"):
        ShuffledOrder([1], seed=0, window=0)
    with pytest.raises(ValueError, match="group"):
        ShuffledOrder([1], seed=0, group=0)
    for batch, rank, world in [(0, 0, 1), (1, 1, 1), (1, -1, 2)]:
        with pytest.raises(ValueError, match="rank"):
            PositionBatchSampler(
                ShuffledOrder([1], seed=0), batch=batch, rank=rank, world=world, start=int
            )


@given(st.integers(0, 40), st.integers(1, 7), st.integers(1, 5))
def test_validation_sees_each_sample_once(count, batch, world):
    ranks = [split_strided_batches(count, batch=batch, rank=r, world=world) for r in range(world)]
    seen = [item for batches in ranks for group in batches for item in group]
    assert sorted(seen) == [(i, i) for i in range(count)]
    assert all(1 <= len(group) <= batch for batches in ranks for group in batches)
