import json
import logging
import re
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from bad_sample_runs import fit
from batches import collate
from material import encoded, picture, samples, tar_bytes
from PIL import Image
from torch.utils.data import DataLoader

from ldm.data.bad_samples import MIN_ALLOWED_SKIPS, BadSample, BadSampleCounter, TooManySkippedError
from ldm.data.dataset import TextImageDataset
from ldm.data.image_decoding import ImageError
from ldm.data.position_sampler import PositionBatchSampler, ShuffledOrder
from ldm.data.shards.index import ReadOptions, open_index
from ldm.data.shards.reader import ShardReader

CUT = encoded(Image.linear_gradient("L"), "JPEG")[:-100]
BAD = {3: b"no image", 4: CUT, 9: b""}  # by index; 3 and 4 side by side, 9 the last
COUNT = 10


def folder_of(tmp_path, images: list[bytes], *, shards: int = 2):
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, part in enumerate(np.array_split(range(len(images)), shards)):
        members = []
        for n in part:
            members += [(f"{n:03}.png", images[n]), (f"{n:03}.txt", b"number %d" % n)]
        (folder / f"{number}.tar").write_bytes(tar_bytes(members))
    return folder


def images(bad: dict[int, bytes], count: int = COUNT) -> list[bytes]:
    return [bad.get(n, picture(n)) for n in range(count)]


@pytest.fixture
def damaged(tmp_path):
    return folder_of(tmp_path, images(BAD))


def open_set(folder, on_error: str = "skip") -> TextImageDataset:
    return TextImageDataset(ShardReader(folder), size=8, seed=0, train=True, on_error=on_error)


def test_the_next_decodable_sample_replaces_a_damaged_one(damaged):
    data = open_set(damaged)
    items = [data[i, 40 + i] for i in range(COUNT)]
    assert [item["key"] for item in items] == [f"{n:03}" for n in (0, 1, 2, 5, 5, 5, 6, 7, 8, 0)]
    assert [item["captions"] for item in items][3:5] == ["number 5"] * 2
    assert [item["position"] for item in items] == list(range(40, 50))
    assert [i for i, item in enumerate(items) if item["skipped"]] == list(BAD)
    told = [item["skipped"][0] for item in items if item["skipped"]]
    assert [skip.reason for skip in told] == [
        "no JPEG, PNG, WEBP, GIF, BMP file",
        "damaged JPEG",
        "no JPEG, PNG, WEBP, GIF, BMP file",
    ]
    assert "0.tar: sample '003'" in told[0].message
    with pytest.raises(ImageError, match="sample '003'"):
        open_set(damaged, "stop")[3, 0]
    with pytest.raises(ValueError, match="on_error must be"):
        open_set(damaged, "ignore")


def stream(folder, *, start: int, batch: int, world: int, workers: int, steps: int) -> list[tuple]:
    """(position, key, pixels) that all ranks together see."""
    data, ranks = open_set(folder), []
    order = ShuffledOrder(data.shards.index.shard_sizes(), seed=2)
    for rank in range(world):
        batches = PositionBatchSampler(
            order, batch=batch, rank=rank, world=world, start=lambda: start
        )
        loader = DataLoader(data, batch_sampler=batches, num_workers=workers, collate_fn=collate)
        ranks.append(list(islice(iter(loader), steps)))
    return [
        (position, key, pixels.tolist())
        for step in range(steps)
        for rank in ranks
        for position, key, pixels in zip(
            rank[step]["position"], rank[step]["key"], rank[step]["images"], strict=True
        )
    ]


def test_skipping_is_a_function_of_the_data_alone(damaged, tmp_path):
    """The same for each way to split the work, and all other positions as without damage."""
    whole = stream(damaged, start=0, batch=6, world=1, workers=0, steps=6)
    assert stream(damaged, start=0, batch=3, world=2, workers=2, steps=6) == whole
    assert stream(damaged, start=12, batch=2, world=3, workers=0, steps=4) == whole[12:]
    (tmp_path / "good").mkdir()
    intact = stream(
        folder_of(tmp_path / "good", images({})), start=0, batch=6, world=1, workers=0, steps=6
    )
    differing = [i for i in range(36) if whole[i] != intact[i]]
    assert differing == [i for i in range(36) if int(intact[i][1]) in BAD]
    assert len(differing) >= 9


def test_a_run_counts_skips_and_warns_once_a_reason(damaged, caplog):
    with caplog.at_level(logging.WARNING, logger="ldm"):
        data, module = fit(damaged, on_error="skip", max_skipped=0.5, workers=2)
    assert (data.train_skips.seen, data.train_skips.total) == (50, 15)
    assert data.train_skips.counts == {"no JPEG, PNG, WEBP, GIF, BMP file": 10, "damaged JPEG": 5}
    assert (data.val_skips.seen, data.val_skips.total) == (10, 3)
    assert len(module.keys) == 50
    assert set(Counter(module.keys)) == {f"{n:03}" for n in range(COUNT) if n not in BAD}
    assert module.validated == [f"{n:03}" for n in (0, 1, 2, 5, 5, 5, 6, 7, 8, 0)]
    assert caplog.text.count("skipped, the next sample takes its place") == 4  # twice two reasons


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_stops_at_the_first_damaged_sample_by_default(damaged, workers):
    with pytest.raises(ImageError, match=r"\d\.tar: sample '00[349]'"):
        fit(damaged, workers=workers)


def test_too_many_stop_the_run_with_the_counts(damaged):
    with pytest.raises(TooManySkippedError) as error:
        fit(damaged, on_error="skip", workers=2)
    told = str(error.value)
    count, seen = map(int, re.search(r"training: (\d+) of (\d+) samples", told).groups())
    assert MIN_ALLOWED_SKIPS < count <= MIN_ALLOWED_SKIPS + 3
    assert 35 <= seen <= 40
    assert "damaged JPEG: " in told
    assert "data.max_skipped=0.01" in told
    assert "sample '00" in told


@pytest.mark.parametrize("workers", [0, 2])
def test_only_damaged_samples_are_an_error_at_once(tmp_path, workers):
    bad = {n: (b"no image", CUT)[n % 2] for n in range(COUNT)}
    folder = folder_of(tmp_path, images(bad))
    with pytest.raises(TooManySkippedError, match=r"none of the 10 samples .*: 5, .*: 5\)"):
        fit(folder, on_error="skip", max_skipped=1.0, workers=workers)


def test_one_skip_in_a_hundred_is_allowed_two_are_not():
    bad = BadSample("damaged JPEG", "shard: sample 'x'")
    skips = BadSampleCounter("training", limit=0.01)
    skips.add(64, [bad] * MIN_ALLOWED_SKIPS)
    with pytest.raises(TooManySkippedError, match="damaged JPEG: 11"):
        skips.add(64, [bad])
    skips = BadSampleCounter("training", limit=0.01)
    for _ in range(1000):
        skips.add(100, [bad])
    assert skips.total == 1000
    with pytest.raises(TooManySkippedError, match=r"1002 of 100100 .*damaged JPEG: 1002"):
        skips.add(100, [bad, bad])
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="max_skipped is a share"):
            BadSampleCounter("training", limit=wrong)


def test_small_images_and_missing_captions_are_not_in_the_index(tmp_path, caplog):
    """The order of the rest is that of a set which never had them."""
    sizes = [(40, 20), (20, 40), (19, 300), (20, 20), (300, 1), (64, 64)]
    members = []
    for n, size in enumerate(sizes):
        image = encoded(Image.new("RGB", size), "JPEG", icc_profile=b"x" * 60_000 * n)
        members += [(f"{n}.jpg", image), (f"{n}.json", json.dumps({"caption": str(n)}).encode())]
    members += [
        ("6.jpg", b"no image"),
        ("6.txt", b"6"),
        ("7.jpg", encoded(Image.new("RGB", (99, 99)))),
    ]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(tar_bytes(members))
    (tmp_path / "in" / "1.tar").write_bytes(tar_bytes(samples(3)))
    (tmp_path / "in" / "2.tar").write_bytes(
        tar_bytes([("8.png", picture(size=(50, 50))), ("8.txt", b"8")])
    )

    def kept(min_size: int | None) -> list[str]:
        index = ShardReader(tmp_path / "in", ReadOptions(min_size=min_size)).index
        return [index.key(i) for i in range(len(index))]

    assert kept(None) == ["0", "1", "2", "3", "4", "5", "6", "0000", "0001", "0002", "8"]
    with caplog.at_level(logging.WARNING):
        assert kept(20) == ["0", "1", "3", "5", "8"]
    counts = {"no caption": 1, "short side under 20 px": 5, "unreadable header": 1}
    assert str(counts) in caplog.text
    saved = (tmp_path / "in" / "index.npz").stat().st_mtime_ns
    assert kept(64) == ["5"]
    assert kept(None)[2] == "2"
    measured = open_index(tmp_path / "in", ReadOptions(measure=True)).sizes
    assert measured[-1].tolist() == [50, 50]
    assert measured[6].tolist() == [0, 0], "an unreadable header"
    assert (tmp_path / "in" / "index.npz").stat().st_mtime_ns == saved  # measured once
    shards = ShardReader(tmp_path / "in", ReadOptions(min_size=20))
    assert shards.index.shard_sizes() == [4, 0, 1]
    assert [shards.read(i).captions for i in range(5)] == [["0"], ["1"], ["3"], ["5"], ["8"]]
    with pytest.raises(ValueError, match="short side under 1000 px"):
        kept(1000)
    with pytest.raises(ValueError, match="min_size must be 1"):
        kept(0)
