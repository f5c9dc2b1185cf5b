"""Batches of images of several aspects: each has one size, and every sample comes."""

import re
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from material import encoded, tar_bytes
from PIL import Image
from test_batch_slots import assert_same, copied, loaders

from ldm.data.buckets import number_target_sizes
from ldm.data.image_decoding import crop_and_resize, pil_to_tensor, read_image
from ldm.data.pixel_area import compute_square_side, parse_pixels
from ldm.data.position_sampler import split_strided_batches

SIZES = [(24, 16), (16, 24), (16, 16)]  # width and height
PICTURES = [(48, 32), (30, 50), (40, 40), (64, 30)]


def paint(number: int) -> bytes:
    width, height = PICTURES[number % len(PICTURES)]
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 4, y * 4, np.full_like(x, number * 9)], axis=-1)
    return encoded(Image.fromarray(pixels.astype(np.uint8)), "JPEG", quality=95)


@pytest.fixture
def folder(tmp_path) -> str:
    for shard in range(3):
        members = []
        for n in range(shard * 12, shard * 12 + 12):
            data = paint(n)[:-60] if n == 5 else paint(n)
            members += [(f"{n:04}.jpg", data), (f"{n:04}.txt", b"text")]
        (tmp_path / f"{shard}.tar").write_bytes(tar_bytes(members))
    return str(tmp_path)


def bucketed(folder: str, *, workers: int = 0, gives_sizes: bool = False, **more) -> tuple:
    both = loaders(folder, workers=workers, buckets=SIZES, **more)
    for each in both:
        get_dataset(each).gives_sizes = gives_sizes
    return both


def get_dataset(loader):
    return getattr(loader, "loader", loader).dataset.dataset


def test_each_batch_has_one_size_and_every_sample_comes(folder):
    train, val = bucketed(folder, on_error="skip")
    batches = [copied(batch) for batch in islice(train, 12)]
    sides = Counter(tuple(batch["images"].shape[-2:]) for batch in batches)
    assert sides.keys() == {(16, 24), (24, 16), (16, 16)}
    checked = [copied(batch) for batch in val]
    numbers = sorted(number for batch in checked for number in batch["position"])
    assert numbers == list(range(36))
    for batch in checked:
        for image, number in zip(batch["images"], batch["position"], strict=True):
            width, height = PICTURES[number % len(PICTURES)]
            tall = (height > width) - (height < width)
            assert image.shape[1] - image.shape[2] == 8 * tall


def test_workers_change_no_bit_of_batches_of_several_sizes(folder):
    here, there = (bucketed(folder, workers=n, gives_sizes=True) for n in (0, 2))
    slots = there[0].loader.dataset.slots
    assert slots.shape == (2, 4, 4 * 3 * 24 * 16), "of the largest size"
    for one, other in zip(here, there, strict=True):
        ours = [copied(batch) for batch in islice(one, 12)]
        theirs = [copied(batch) for batch in islice(other, 12)]
        for pair in zip(ours, theirs, strict=True):
            assert torch.equal(*(batch.pop("sizes") for batch in pair))
        assert_same(ours, theirs)


def test_a_damaged_sample_is_replaced_by_one_of_its_size(folder):
    _, val = bucketed(folder)
    data = get_dataset(val)
    batch = data.read_batch([(5, 5)])
    assert batch["key"] == ["0009"], "the next upright one"
    assert batch["images"].shape == (1, 3, 24, 16)
    assert len(batch["skipped"]) == 1


def test_a_batch_of_two_sizes_is_refused(folder):
    _, val = bucketed(folder)
    with pytest.raises(ValueError, match="the images of a batch have one size"):
        get_dataset(val).read_batch([(0, 0), (1, 1)])


def test_sizes_describe_the_crop_that_was_read(folder):
    """By them the image is found again in the one that was scaled as a whole."""
    train, _ = bucketed(folder, gives_sizes=True, flip=0.5)
    data = get_dataset(train)
    data.fast_pixels = False  # Pillow's resize
    flipped = 0
    for position in range(40):
        index = position % 36
        if index == 5:
            continue
        batch = data.read_batch([(index, position)])
        height, width, top, left, h, w = batch["sizes"][0].tolist()
        assert batch["images"].shape == (1, 3, h, w)
        image = read_image(data.shards.read(index).image)
        assert image.size == (width, height)
        scale = max(h / height, w / width)
        whole = image.resize((round(width * scale), round(height * scale)), Image.BICUBIC)
        crop = data._draw_crop(index, position)
        whole = whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.flip else whole
        flipped += crop.flip
        found = pil_to_tensor(whole.crop((left, top, left + w, top + h)))
        assert (found.int() - batch["images"][0].int()).abs().float().mean() < 5
    assert 5 < flipped < 35


def test_square_batches_have_sizes_too(folder):
    _, val = loaders(folder, workers=0, on_error="skip")
    dataset = get_dataset(val)
    dataset.gives_sizes = True
    batch = dataset.read_batch([(0, 0), (1, 1)])
    assert batch["sizes"].tolist() == [[32, 48, 0, 4, 16, 16], [50, 30, 5, 0, 16, 16]]
    assert batch["sizes"].dtype == torch.int32


def test_a_checkpoint_of_before_goes_on_without_sizes(folder):
    _, val = loaders(folder, workers=0, on_error="skip")
    dataset = get_dataset(val)
    dataset.gives_sizes = True
    dataset.follow_rules({"fast_pixels": True})
    assert "sizes" not in dataset.read_batch([(0, 0)])
    dataset.gives_sizes = True
    dataset.follow_rules(dataset.rules())
    assert "sizes" in dataset.read_batch([(0, 0)])


def test_evaluations_read_squares_of_bucketed_data(folder):
    _, val = bucketed(folder)
    data = get_dataset(val).without_augmentation()
    images = data.read_batch([(0, 0), (1, 1)])["images"]
    assert torch.equal(images[1], pil_to_tensor(crop_and_resize(read_image(paint(1)), 16)))
    tall = get_dataset(val).without_augmentation(size=(24, 8))
    assert tall.read_batch([(0, 0), (1, 1)])["images"].shape == (2, 3, 24, 8)


def test_validation_batches_have_one_kind_and_are_shared_out():
    kinds = np.array([1, 0, 0, 2, 1, 0, 1, 2, 0, 0])
    for world in (1, 2, 3):
        ranks = [
            split_strided_batches(10, batch=2, rank=rank, world=world, kinds=kinds)
            for rank in range(world)
        ]
        batches = [batch for batches in ranks for batch in batches]
        assert sorted(i for batch in batches for i, _ in batch) == list(range(10))
        assert all(len({kinds[i] for i, _ in batch}) == 1 for batch in batches)
        assert max(map(len, batches)) <= 2
        counts = [sum(map(len, batches)) for batches in ranks]
        assert max(counts) - min(counts) <= 1


def test_equal_sizes_have_one_number():
    sizes = np.array([[3, 4], [4, 3], [3, 4]])
    assert number_target_sizes(sizes).tolist() == [0, 1, 0]
    assert number_target_sizes(None) is None


@pytest.mark.parametrize("multiple", [8, 16, 32, 64])
def test_the_square_of_listed_sizes_goes_through_the_networks_that_they_go_through(multiple):
    for sizes in ([[4, 3], [3, 4]], [[5, 3], [3, 5]], [[1, 4]], [[7, 5], [6, 6]]):
        side = compute_square_side(None, [[multiple * side for side in size] for size in sizes])
        assert side >= multiple
        assert side % multiple == 0


def test_areas_and_their_squares():
    assert parse_pixels("512*512") == parse_pixels(512 * 512) == 512**2
    assert compute_square_side("512*512", "auto") == 512
    assert compute_square_side(1_000_000, "auto") == 1000
    assert compute_square_side("640*384", "auto") == 512
    assert compute_square_side(None, [[96, 64], [64, 96]]) == 64
    assert compute_square_side(None, [[768, 512], [512, 768], [640, 640]]) == 640
    assert compute_square_side(None, "auto") == compute_square_side(None, None) == 64
    for wrong in ("512x512", "0*5", "-1", "1*2*3", "", 0, 1.5):
        with pytest.raises(ValueError, match=re.escape(f"data.pixels={wrong} is no area")):
            parse_pixels(wrong)
