"""Batches that workers decode in place are those that are read without workers."""

import logging
import os
import shutil
import signal
import time
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from material import encoded, tar_bytes
from PIL import Image
from torch.utils.data import DataLoader

from ldm.data.batch_slots import BatchDataset, allocate_slots, pass_batch
from ldm.data.datamodule import TextImageData
from ldm.data.dataset import TextImageDataset
from ldm.data.image_decoding import ImageError
from ldm.data.position_sampler import PositionBatchSampler, ShuffledOrder
from ldm.data.shards.reader import ShardReader

BATCH, SIZE = 4, 16


def ramp(n: int) -> bytes:
    image = Image.linear_gradient("L").rotate(n * 37).resize((40 + n % 5, 30)).convert("RGB")
    return encoded(image, ("JPEG", "PNG")[n % 2])


def write(folder, images: list[bytes]) -> str:
    members = []
    for n, image in enumerate(images):
        members += [(f"{n:03}.png", image), (f"{n:03}.txt", b"number %d" % n)]
    (folder / "0.tar").write_bytes(tar_bytes(members))
    return str(folder)


@pytest.fixture
def folder(tmp_path) -> str:
    images = [ramp(n) for n in range(22)]
    images[7] = images[7][:-60]
    return write(tmp_path, images)


def loaders(folder: str, *, workers: int, steps: int = 12, **options) -> tuple:
    data = TextImageData(
        train=folder,
        val=folder,
        size=SIZE,
        batch_size=BATCH,
        val_batch_size=5,
        workers=workers,
        **{"on_error": "skip", **options},
    )
    data.trainer = SimpleNamespace(
        world_size=1, num_devices=1, accumulate_grad_batches=1, global_rank=0, max_steps=steps
    )
    return data.train_dataloader(), data.val_dataloader()


def copied(batch: dict) -> dict:
    return {**batch, "images": batch["images"].clone()}


def assert_same(batches: list[dict], others: list[dict]) -> None:
    for batch, other in zip(batches, others, strict=True):
        assert torch.equal(batch["images"], other["images"])
        assert batch["images"].is_contiguous()
        assert {**batch, "images": None} == {**other, "images": None}


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_change_no_bit(folder, workers):
    """Of training and of validation, whose last batch is smaller; twice by the same workers."""
    train, val = loaders(folder, workers=0)
    expected = [copied(batch) for batch in islice(train, 12)], list(val)
    assert [len(batch["key"]) for batch in expected[1]] == [5, 5, 5, 5, 2]
    assert sum(len(batch["skipped"]) for batch in expected[1]) == 1
    train, val = loaders(folder, workers=workers)
    assert train.loader.dataset.slots.shape == (workers, 4, BATCH * 3 * SIZE * SIZE)
    for _ in range(2):
        assert_same([copied(batch) for batch in val], expected[1])
    assert_same([copied(batch) for batch in islice(train, 12)], expected[0])
    assert_same([copied(batch) for batch in val], expected[1])


@pytest.mark.parametrize("workers", [1, 2])
def test_a_batch_and_the_one_before_it_stay_as_they_are(folder, workers):
    """Also where the consumer is slower than the workers, which then are as far as they may."""
    expected = [copied(batch) for batch in islice(loaders(folder, workers=0)[0], 12)]
    kept = []
    for n, batch in enumerate(islice(loaders(folder, workers=workers)[0], 12)):
        kept = [*kept[-1:], batch]
        time.sleep(0.05)
        assert_same(kept, expected[max(n - 1, 0) : n + 1])


def test_videos_are_decoded_in_place(tmp_path):
    frames = [Image.new("RGB", (20, 18), colour) for colour in ("red", "green", "blue")]
    video = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    folder = write(tmp_path, [video] * 6)
    here, there = (loaders(folder, workers=n, steps=4, frames=3)[0] for n in (0, 1))
    batches = [copied(batch) for batch in islice(here, 4)]
    assert batches[0]["images"].shape == (BATCH, 3, 3, SIZE, SIZE)
    assert batches[0]["images"][0, :, :, 8, 8].T.tolist() == [[255, 0, 0], [0, 128, 0], [0, 0, 255]]
    assert_same([copied(batch) for batch in islice(there, 4)], batches)


@pytest.mark.slow
def test_spawned_workers_share_the_slots(folder):
    data = TextImageDataset(
        ShardReader(folder), size=SIZE, seed=0, train=True, on_error="skip", fast_pixels=True
    )
    slots = allocate_slots(data, batch=BATCH, workers=2)

    def take(**options) -> list[dict]:
        order = ShuffledOrder(data.shards.index.shard_sizes(), seed=0)
        batches = PositionBatchSampler(order, batch=BATCH, rank=0, world=1, start=lambda: 0)
        batch_data = BatchDataset(data, slots if options else None)
        loader = DataLoader(batch_data, batch_sampler=batches, collate_fn=pass_batch, **options)
        return [copied(batch) for batch in islice(batch_data.open_batches(iter(loader)), 8)]

    assert_same(take(num_workers=2, multiprocessing_context="spawn"), take())


def test_little_shared_memory_is_said_and_does_without(folder, monkeypatch, caplog):
    expected = [copied(batch) for batch in islice(loaders(folder, workers=0)[0], 6)]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    with caplog.at_level(logging.WARNING):
        train, _ = loaders(folder, workers=2)
    assert "2 workers that decode batches of 4 images in place need 1 MiB" in caplog.text
    assert train.loader.dataset.slots is None
    assert_same(list(islice(train, 6)), expected)


def test_every_process_of_a_machine_needs_its_share(folder, monkeypatch, caplog):
    data = TextImageDataset(ShardReader(folder), size=SIZE, seed=0, train=False, on_error="skip")
    size = allocate_slots(data, batch=BATCH, workers=1).nbytes
    free = SimpleNamespace(free=4 * size)  # for training and validation of two processes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    assert allocate_slots(data, batch=BATCH, workers=1, ranks=2) is not None
    assert allocate_slots(data, batch=BATCH, workers=1, ranks=3) is None
    assert "3 workers that decode batches" in caplog.text


def test_a_killed_worker_is_an_error(folder):
    train, _ = loaders(folder, workers=2, steps=10**6)
    batches = iter(train)
    next(batches)
    os.kill(train._iterator._workers[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        list(islice(batches, 10))


def test_a_damaged_image_of_a_worker_is_named(folder):
    with pytest.raises(ImageError, match=r"0\.tar: sample '007'"):
        list(islice(loaders(folder, workers=1, on_error="stop")[0], 12))


@pytest.mark.gpu
def test_slots_are_copied_to_a_gpu_while_the_run_goes_on(folder):
    expected = [copied(batch) for batch in islice(loaders(folder, workers=0)[0], 12)]
    train, _ = loaders(folder, workers=1)
    heavy, found = torch.randn(4096, 4096, device="cuda"), []
    for batch in islice(train, 12):
        assert batch["images"].is_pinned()
        for _ in range(20):
            heavy = (heavy @ heavy).clamp(-1, 1)  # the copy waits in the stream behind it
        found.append(batch["images"].to("cuda", non_blocking=True))
    for images, batch in zip(found, expected, strict=True):
        assert torch.equal(images.cpu(), batch["images"])


@pytest.mark.gpu
def test_slots_that_are_pinned_already_leave_no_error(folder):
    data = TextImageDataset(ShardReader(folder), size=SIZE, seed=0, train=False, on_error="skip")
    slots = allocate_slots(data, batch=BATCH, workers=1)
    first, second = BatchDataset(data, slots), BatchDataset(data, slots)
    first._pin()
    second._pin()
    assert (first._is_pinned, second._is_pinned) == (True, False)
    assert torch.ones(2, device="cuda").sum().item() == 2


def test_whole_batches_need_no_workers(folder):
    data = TextImageDataset(ShardReader(folder), size=SIZE, seed=0, train=False, on_error="skip")
    batch = data.read_batch([(3, 3), (7, 7)])
    assert batch["key"] == ["003", "008"]
    for n, i in enumerate((3, 8)):
        assert torch.equal(batch["images"][n], data[i, i]["images"])
    assert allocate_slots(data, batch=4, workers=0) is None
