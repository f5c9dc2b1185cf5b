import io
import json
import multiprocessing

import pytest
import torch
from batches import collate
from material import encoded, picture, tar_bytes
from PIL import Image
from torch.utils.data import DataLoader

from ldm.data.dataset import TextImageDataset
from ldm.data.image_decoding import ImageError
from ldm.data.position_sampler import PositionBatchSampler, ShuffledOrder, split_strided_batches
from ldm.data.shards.reader import ShardReader

CAPTIONS = [f"caption {n}" for n in range(5)]


def write(folder, images: list[bytes]) -> ShardReader:
    record = json.dumps({"captions": CAPTIONS}).encode()
    members = []
    for n, image in enumerate(images):
        members += [(f"{n:03}.png", image), (f"{n:03}.json", record)]
    (folder / "0.tar").write_bytes(tar_bytes(members))
    return ShardReader(folder)


def ramp(width: int, height: int) -> bytes:
    return encoded(Image.linear_gradient("L").rotate(90).resize((width, height)))


@pytest.fixture
def shards(tmp_path) -> ShardReader:
    return write(tmp_path, [ramp(40, 20), ramp(20, 50), picture(3, (7, 5)), picture(4, (1, 300))])


def test_items_have_the_requested_size(shards):
    data = TextImageDataset(shards, size=16, seed=0, train=False)
    for i in range(4):
        item = data[i, i]
        assert (item["images"].shape, item["images"].dtype) == ((3, 16, 16), torch.uint8)
        assert (item["key"], item["position"], item["captions"]) == (f"{i:03}", i, CAPTIONS[0])


def test_a_thin_image_is_cropped_before_it_is_enlarged(tmp_path):
    shards = write(tmp_path, [encoded(Image.new("RGB", (1, 20_000), "red"))])
    images = TextImageDataset(shards, size=256, seed=0, train=True, crop="random")[0, 0]["images"]
    assert (images == torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None]).all()


def test_validation_uses_the_centre_crop(shards):
    plain = TextImageDataset(shards, size=20, seed=0, train=False, crop="random", flip=1.0)
    centre = Image.open(io.BytesIO(shards.read(0).image)).crop((10, 0, 30, 20))
    expected = torch.tensor(list(centre.convert("L").tobytes()), dtype=torch.uint8).view(20, 20)
    for position in range(5):
        assert (plain[0, position]["images"] == expected).all()
    training = TextImageDataset(shards, size=8, seed=3, train=True, crop="random", flip=0.5)
    assert torch.equal(
        training.without_augmentation(size=20)[0, 1]["images"], plain[0, 0]["images"]
    )
    assert training.without_augmentation()[0, 0]["images"].shape == (3, 8, 8)


def test_crops_depend_on_seed_and_position_only(shards):
    def data(seed: int) -> TextImageDataset:
        return TextImageDataset(shards, size=8, seed=seed, train=True, crop="random", flip=0.5)

    def drawn(data: TextImageDataset, positions) -> list[tuple]:
        items = [data[0, p] for p in positions]
        return [(item["captions"], item["images"].tolist()) for item in items]

    first, second = data(1), data(1)
    torch.manual_seed(0)
    forward = drawn(first, range(30))
    torch.manual_seed(1)
    assert drawn(second, reversed(range(30))) == forward[::-1]
    assert drawn(data(2), range(30)) != forward
    assert len({str(pixels) for _, pixels in forward}) > 10


def test_old_runs_keep_their_uneven_crops(tmp_path):
    """Of three places the outer ones came half as often."""
    source = Image.new("RGB", (6, 4))
    source.paste((250, 0, 0), (5, 0, 6, 4))
    shards = write(tmp_path, [encoded(source)])
    shares = {}
    for even in (True, False):
        data = TextImageDataset(shards, size=4, seed=0, train=True, crop="random")
        assert data.even_crops  # a new run's
        data.even_crops = even
        right = [bool(data[0, p]["images"].max() > 200) for p in range(600)]
        shares[even] = sum(right) / 600
    assert 0.27 < shares[True] < 0.40
    assert 0.19 < shares[False] < 0.31


@pytest.mark.parametrize("frames", [None, 2])
def test_fast_pixels_are_within_two_levels_of_the_resize_of_pillow(tmp_path, frames):
    """With the same crops and flips, of images and of videos."""
    first, second = (Image.linear_gradient("L").rotate(n).resize((60, 44)) for n in (30, 200))
    data = encoded(first, "WEBP", save_all=True, append_images=[second], lossless=True)
    shards = write(tmp_path, [data, encoded(first.convert("RGB"), "JPEG")][: 1 if frames else 2])
    how = {"size": 20, "seed": 0, "crop": "random", "flip": 0.5, "frames": frames, "train": True}
    plain, fast = (TextImageDataset(shards, **how, fast_pixels=fast) for fast in (False, True))
    for position in range(40):
        index = position % len(shards)
        images = [data[index, position]["images"].int() for data in (plain, fast)]
        assert (images[0] - images[1]).abs().max() <= 2
    assert not fast.without_augmentation().fast_pixels  # of evaluations
    assert torch.equal(
        fast.without_augmentation()[0, 0]["images"], plain.without_augmentation()[0, 0]["images"]
    )


def test_the_caption_is_drawn_once_an_epoch(shards):
    data = TextImageDataset(shards, size=8, seed=0, train=True)
    within = {data[1, p]["captions"] for p in range(4)}  # positions of epoch 0
    assert len(within) == 1
    chosen = [data[1, 4 * epoch]["captions"] for epoch in range(200)]
    assert all(20 <= chosen.count(caption) <= 65 for caption in CAPTIONS)
    assert len({data[i, 0]["captions"] for i in range(4)}) > 1


def test_half_of_the_images_are_flipped(shards):
    data = TextImageDataset(shards, size=8, seed=0, train=True, flip=0.5)
    plain = TextImageDataset(shards, size=8, seed=0, train=False)[0, 0]["images"]
    flipped = [data[0, p]["images"].equal(plain.flip(-1)) for p in range(200)]
    assert not plain.equal(plain.flip(-1))
    assert 70 <= sum(flipped) <= 130


@pytest.mark.parametrize("image", [b"", b"no image", picture()[:40], ramp(40, 20)[:-60]])
def test_a_damaged_image_is_named(tmp_path, image):
    data = TextImageDataset(write(tmp_path, [picture(), image]), size=8, seed=0, train=True)
    assert data[0, 0]["key"] == "000"
    with pytest.raises(ImageError, match=r"0\.tar: sample '001'"):
        data[1, 1]


def test_arguments_out_of_range_are_refused(shards):
    for wrong in ({"size": 0}, {"size": 8, "crop": "centre"}, {"size": 8, "flip": 2.0}):
        with pytest.raises(ValueError, match="got"):
            TextImageDataset(shards, seed=0, train=True, **wrong)


def take(shards: ShardReader, *, workers: int, context: str | None = None) -> list[dict]:
    data = TextImageDataset(shards, size=8, seed=5, train=True, crop="random", flip=0.5)
    order = ShuffledOrder(shards.index.shard_sizes(), seed=5)
    batches = PositionBatchSampler(order, batch=3, rank=0, world=1, start=lambda: 2)
    loader = DataLoader(
        data,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        multiprocessing_context=context,
    )
    stream = iter(loader)
    return [next(stream) for _ in range(4)]


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_change_nothing(shards, context):
    assert context in multiprocessing.get_all_start_methods()
    here, there = take(shards, workers=0), take(shards, workers=2, context=context)
    for a, b in zip(here, there, strict=True):
        assert a["images"].equal(b["images"])
        assert a["position"] == b["position"]
        assert (a["captions"], a["key"]) == (b["captions"], b["key"])
    assert [p for batch in here for p in batch["position"]] == list(range(2, 14))


def test_validation_batches_through_a_loader(shards):
    data = TextImageDataset(shards, size=8, seed=0, train=False)
    loader = DataLoader(
        data,
        batch_sampler=split_strided_batches(len(data), batch=3, rank=0, world=1),
        collate_fn=collate,
    )
    batches = list(loader)
    assert [batch["images"].shape[0] for batch in batches] == [3, 1]
    assert len(loader) == 2
    assert batches[0]["captions"] == [CAPTIONS[0]] * 3
    assert all(type(p) is int for p in batches[0]["position"])
