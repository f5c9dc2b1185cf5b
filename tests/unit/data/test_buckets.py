import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.data.buckets import (
    assign_buckets,
    list_bucket_sizes,
    merge_small_buckets,
    warn_of_small_buckets,
)

sides = st.integers(1, 3000)
image_sizes = st.lists(st.tuples(sides, sides), min_size=1, max_size=40)
bucket_sizes = st.lists(st.tuples(sides, sides), min_size=1, max_size=6)


def test_the_sizes_of_stable_diffusion_xl():
    sizes = list_bucket_sizes(1024 * 1024, multiple=64)
    assert (1024, 1024) in sizes
    assert (512, 2048) in sizes
    assert (1344, 768) in sizes, "16:9"
    assert set(sizes) == {(h, w) for w, h in sizes}
    assert all(w % 64 == h % 64 == 0 for w, h in sizes)
    assert max(abs(w * h / 1024**2 - 1) for w, h in sizes) <= 1 / 8


@given(st.integers(1, 64), st.floats(1, 400))
def test_every_bucket_is_on_the_grid_and_near_the_area(multiple, area):
    pixels = area * multiple**2
    sizes = list_bucket_sizes(pixels, multiple=multiple)
    assert any(w == h for w, h in sizes)
    for w, h in sizes:
        assert w % multiple == h % multiple == 0
        assert max(w, h) <= 4 * min(w, h)
        assert abs(w * h - pixels) <= (max(w, h) + multiple) * multiple, "a step of one side"


def test_a_panorama_is_not_cropped_to_a_square():
    for pixels, multiple in [(512 * 512, 64), (256 * 256, 32), (64 * 64, 8)]:
        buckets = assign_buckets(
            np.array([[1920, 1080], [1080, 1920], [500, 500]]),
            list_bucket_sizes(pixels, multiple=multiple),
        )
        assert buckets.cut.max() < 0.06
        assert len(set(buckets.bucket.tolist())) == 3


@given(image_sizes, bucket_sizes)
def test_the_bucket_cuts_least(images, sizes):
    buckets = assign_buckets(np.array(images), sizes)
    for (w, h), bucket, cut in zip(images, buckets.bucket, buckets.cut, strict=True):
        kept = [min(w * b, h * a) / max(w * b, h * a) for a, b in sizes]
        assert cut == pytest.approx(1 - max(kept), abs=1e-6)
        assert kept[bucket] == max(kept)
    assert buckets.counts.tolist() == [buckets.bucket.tolist().count(b) for b in range(len(sizes))]


def test_of_equal_crops_the_nearest_area_then_the_first():
    sizes = [(64, 64), (128, 128), (96, 128), (128, 96)]
    images = np.array([[70, 70], [500, 500], [80, 80], [300, 400], [0, 0]])
    assert assign_buckets(images, sizes).bucket.tolist() == [0, 1, 0, 2, 0]
    # A square loses as much to 3:4 as to 4:3.
    assert assign_buckets(np.array([[9, 9]]), [(96, 128), (128, 96)]).bucket.tolist() == [0]


@given(image_sizes, st.integers(1, 20))
def test_small_buckets_go_to_the_next_best(images, minimum):
    images = np.array(images)
    before = assign_buckets(images, list_bucket_sizes(64 * 64, multiple=8))
    after = merge_small_buckets(before, images, minimum=minimum)
    assert len(after.sizes) == 1 or after.counts.min() >= minimum
    assert set(after.sizes) <= set(before.sizes)
    best = assign_buckets(images, after.sizes)
    assert after.bucket.tolist() == best.bucket.tolist()
    assert after.cut.tolist() == best.cut.tolist()


def test_small_buckets_of_a_list_are_named(caplog):
    buckets = assign_buckets(np.array([[9, 9]] * 5 + [[4, 2]]), [(64, 64), (128, 64), (64, 128)])
    with caplog.at_level(logging.WARNING):
        warn_of_small_buckets(buckets, minimum=4)
    assert "128x64 (1), 64x128 (0): fewer images than a batch of 4" in caplog.text
    assert "64x64 83.3%, 128x64 16.7%; cut away: 0.0% of an image" in buckets.describe()
    images = {"64x64": 5, "128x64": 1, "64x128": 0}
    assert buckets.summarize() == {"images": images, "cut_away": 0.0}


def test_bad_buckets_are_refused():
    for sizes in ([], [(0, 3)], [(1, 2, 3)]):
        with pytest.raises(ValueError, match="pairs"):
            assign_buckets(np.array([[1, 1]]), sizes)
    with pytest.raises(ValueError, match="multiples of 64"):
        list_bucket_sizes(100, multiple=64)
