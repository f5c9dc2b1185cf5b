from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.data.bucket_order import BucketedOrder
from ldm.data.position_sampler import PositionBatchSampler, ShuffledOrder

sizes = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(sum)
seeds = st.integers(0, 2**64)


@st.composite
def bucketed(draw, max_buckets=4):
    """The arguments of an order of up to `max_buckets` buckets."""
    shard_sizes = draw(sizes)
    count = draw(st.integers(1, max_buckets))
    bucket = draw(
        st.lists(st.integers(0, count - 1), min_size=sum(shard_sizes), max_size=sum(shard_sizes))
    )
    options = {
        "batch": draw(st.integers(1, 12)),
        "seed": draw(seeds),
        "window": draw(st.integers(1, 4)),
    }
    return shard_sizes, np.array(bucket), options


def make(arguments, **more) -> BucketedOrder:
    shard_sizes, bucket, options = arguments
    return BucketedOrder(shard_sizes, bucket, **options, **more)


def read(order, stop: int, start: int = 0) -> list[int]:
    return [order.at(position)[1] for position in range(start, stop)]


def by_hand(arguments, epochs: int) -> list[list[list[int]]]:
    """The rule, a sample at a time: the batches of each epoch."""
    shard_sizes, bucket, options = arguments
    shuffled = ShuffledOrder(shard_sizes, seed=options["seed"], window=options["window"])
    waiting: dict[int, list[int]] = {}
    found = []
    for epoch in range(epochs):
        found.append([])
        for sample in shuffled.permute(epoch).tolist():
            batch = waiting.setdefault(bucket[sample], [])
            batch.append(sample)
            if len(batch) == options["batch"]:
                found[-1].append(waiting.pop(bucket[sample]))
    return found


@given(bucketed())
def test_the_order_is_the_rule_done_by_hand(arguments):
    epochs = by_hand(arguments, 5)
    order, position = make(arguments), 0
    for epoch, batches in enumerate(epochs):
        for batch in batches:
            expected = [(epoch, sample) for sample in batch]
            assert [order.at(position + i) for i in range(len(batch))] == expected
            position += len(batch)


@given(bucketed(), st.integers(0, 40))
def test_a_batch_is_of_one_bucket_and_no_sample_is_dropped_or_twice(arguments, batches):
    _, bucket, options = arguments
    seen = read(make(arguments), batches * options["batch"])
    for first in range(0, len(seen), options["batch"]):
        assert len(set(bucket[seen[first : first + options["batch"]]])) == 1
    for number in set(bucket.tolist()):
        own = [sample for sample in seen if bucket[sample] == number]
        members = set(np.flatnonzero(bucket == number).tolist())
        for first in range(0, len(own), len(members)):  # each pass over a bucket
            part = own[first : first + len(members)]
            assert len(set(part)) == len(part)
            assert set(part) == members or first + len(members) > len(own)


@given(bucketed(), st.lists(st.integers(0, 2000), max_size=12))
def test_positions_can_be_read_in_any_order(arguments, positions):
    order = make(arguments)
    assert [order.at(p) for p in positions] == [make(arguments).at(p) for p in positions]


@given(bucketed(max_buckets=1))
def test_a_single_bucket_has_the_samples_of_the_shuffled_order(arguments):
    shard_sizes, _, options = arguments
    shuffled = ShuffledOrder(shard_sizes, seed=options["seed"], window=options["window"])
    assert read(make(arguments), 100) == read(shuffled, 100)


@given(bucketed(), st.sampled_from([(1, 12), (2, 6), (3, 4), (4, 3), (12, 1), (2, 2), (4, 1)]),
       st.integers(0, 6))  # fmt: skip
def test_world_sizes_and_accumulation_see_the_same_batches(arguments, shape, steps):
    """12 samples a step; some shapes have several micro-steps."""
    arguments[2]["batch"] = 12
    order, (world, micro) = make(arguments), shape
    ranks = [
        iter(
            PositionBatchSampler(order, batch=micro, rank=r, world=world, start=lambda: 12 * steps)
        )
        for r in range(world)
    ]
    taken = [p for _ in range(3 * 12 // (world * micro)) for rank in ranks for p in next(rank)]
    positions = range(12 * steps, 12 * (steps + 3))
    assert taken == [(order.at(p)[1], p) for p in positions]


@given(bucketed(), st.integers(0, 200))
def test_the_shards_of_each_batch_are_upcoming_in_time(arguments, position):
    shard_sizes, _, options = arguments
    order, batch = make(arguments), options["batch"]
    shard_of = np.repeat(np.arange(len(shard_sizes)), shard_sizes)
    horizon = (position // batch + 40) * batch
    upcoming = order.shards_from(position)
    needed, sent = {}, []
    for p in range(position, horizon, batch):
        first = p // batch * batch
        shards = set(shard_of[read(order, first + batch, first)].tolist())
        for shard in shards:
            while needed.get(shard, 0) < first + batch:  # it comes before it is needed
                end, found = next(upcoming)
                needed[found] = end
                sent.append(found)
    assert len(sent) <= 40 * batch + len(shard_sizes) * 40


weighted = st.lists(
    st.tuples(st.lists(st.integers(1, 9), min_size=1, max_size=3),
              st.sampled_from([0.1, 0.3, 0.5, 1, 1.5, 2, 3])),
    min_size=1, max_size=3,
).filter(lambda parts: sum(weight * sum(own) for own, weight in parts) >= 1)  # fmt: skip


@given(weighted, st.integers(1, 3), st.integers(1, 8), seeds, st.integers(1, 40))
def test_each_data_set_has_its_share_and_comes_once_a_pass(parts, count, batch, seed, batches):
    shard_sizes = [size for own, _ in parts for size in own]
    data_sets = [(len(own), weight) for own, weight in parts]
    bucket = np.arange(sum(shard_sizes)) * 7 % 5 % count
    order = BucketedOrder(shard_sizes, bucket, batch=batch, seed=seed, data_sets=data_sets)
    seen = read(order, batches * batch)
    again = BucketedOrder(shard_sizes, bucket, batch=batch, seed=seed, data_sets=data_sets)
    assert read(again, batches * batch, (batches - 1) * batch) == seen[-batch:]
    begin = 0
    for own, _ in parts:
        for number in range(count):
            members = {i for i in range(begin, begin + sum(own)) if bucket[i] == number}
            mine = [sample for sample in seen if sample in members]
            for first in range(0, len(mine), max(len(members), 1)):
                part = mine[first : first + len(members)]
                assert len(set(part)) == len(part)
        begin += sum(own)


def test_weights_are_shares_of_each_data_sets_own_size():
    """Half of 40, once 20, twice 10: 60 an epoch, evenly mixed."""
    order = BucketedOrder(
        [20, 20, 20, 10], np.zeros(70, int), batch=5, seed=1, data_sets=[(2, 0.5), (1, 1), (1, 2)]
    )
    assert len(order) == 60
    one, two = read(order, 60), read(order, 120, 60)
    for epoch in (one, two):
        assert Counter(0 if i < 40 else 1 if i < 60 else 2 for i in epoch) == {0: 20, 1: 20, 2: 20}
        assert Counter(i for i in epoch if i >= 60) == dict.fromkeys(range(60, 70), 2)
        assert Counter(i for i in epoch if 40 <= i < 60) == dict.fromkeys(range(40, 60), 1)
        for first in range(0, 60, 15):  # mixed
            part = [0 if i < 40 else 1 if i < 60 else 2 for i in epoch[first : first + 15]]
            assert Counter(part) == {0: 5, 1: 5, 2: 5}
    assert sorted(i for i in one + two if i < 40) == list(range(40)), "the other half comes next"


def test_data_sets_of_the_same_shape_have_orders_of_their_own():
    order = BucketedOrder([9, 9], np.zeros(18, int), batch=2, seed=0, data_sets=[(1, 1), (1, 1)])
    seen = read(order, 18)
    assert [i for i in seen if i < 9] != [i - 9 for i in seen if i >= 9]


def test_the_bucketed_order_never_changes():
    """Written down once, as that of ShuffledOrder."""
    bucket = np.array([0, 1, 0, 0, 1, 0, 0, 2, 0])
    order = BucketedOrder(
        [3, 2, 4], bucket, batch=2, seed=7, window=2, data_sets=[(2, 0.5), (1, 1)]
    )
    expected = [2, 6, 5, 8, 7, 7, 4, 1, 3, 5, 8, 0, 6, 2, 6, 5, 8, 0, 7, 7, 3, 6, 1, 4]
    assert read(order, 24) == expected


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="2 buckets for 3 samples"):
        BucketedOrder([3], np.zeros(2, int), batch=1, seed=0)
    with pytest.raises(ValueError, match="data sets of 2 shards"):
        BucketedOrder([3], np.zeros(3, int), batch=1, seed=0, data_sets=[(2, 1.0)])
    with pytest.raises(ValueError, match="an epoch of less than one sample"):
        BucketedOrder([3], np.zeros(3, int), batch=1, seed=0, data_sets=[(1, 0.1)])
    many = 20_000
    with pytest.raises(ValueError, match="give the others smaller weights"):
        BucketedOrder([many], np.zeros(many, int), batch=1, seed=0, data_sets=[(1, 1e4)])
