import os
import pickle
import warnings
from pathlib import Path

import pytest
import webdataset
from material import picture, samples, tar_bytes

from ldm.data.shards.reader import ShardReader, write_shard
from ldm.data.shards.tar_headers import ShardError


def by_webdataset(*paths: Path) -> list[dict]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False))


def test_reads_what_webdataset_reads(tmp_path):
    image = picture()
    names = [
        "a.png",
        "b.x/c.jpg",
        "b.x/c.seg.png",
        "d.PNG",
        "e.extra.txt",
        "e.webp",
        "./f.jpeg",
        "g",
    ]
    members = [(name, image + name.encode()) for name in names]
    for key in ("g.txt", "./f.txt", "e.txt", "d.JSON", "b.x/c.txt", "a.txt"):
        where = [i for i, (name, _) in enumerate(members) if name.startswith(key[:-4].rstrip("."))]
        members.insert(where[-1] + 1, (key, b'{"caption": "of %s"}' % key.encode()))
    path = tmp_path / "0.tar"
    path.write_bytes(tar_bytes(members))
    shards = ShardReader(tmp_path)
    ours = {sample.key: sample.image for sample in map(shards.read, range(len(shards)))}
    theirs = {}
    for sample in by_webdataset(path):
        images = [sample[s] for s in ("jpg", "jpeg", "png", "webp") if s in sample]
        if images and ("txt" in sample or "json" in sample):
            theirs[sample["__key__"]] = images[0]
    assert ours == theirs
    assert len(ours) == 5


def test_written_shards_are_read_by_both_readers(tmp_path):
    written = [
        (f"{n:09}", {"png": picture(n), "txt": b"t", "json": b'{"caption": "number %d"}' % n})
        for n in range(5)
    ]
    assert write_shard(tmp_path / "00000.tar", iter(written)) == 5
    shards = ShardReader(tmp_path)
    for n, theirs in enumerate(by_webdataset(tmp_path / "00000.tar")):
        ours = shards.read(n)
        assert (ours.key, ours.image) == (theirs["__key__"], theirs["png"])
        assert ours.captions == [f"number {n}"]
    assert n == 4


def test_a_shard_is_the_same_each_time(tmp_path):
    for name in ("a.tar", "b.tar"):
        write_shard(tmp_path / name, [("k", {"png": picture(), "txt": b"x"})])
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_a_failed_write_leaves_the_old_shard(tmp_path):
    path = tmp_path / "0.tar"
    write_shard(path, [("old", {"png": picture(), "txt": b"x"})])

    def failing():
        yield "new", {"png": picture(), "txt": b"x"}
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError):
        write_shard(path, failing())
    assert ShardReader(path).read(0).key == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["0.tar"]


def test_any_order_of_reading(shard_folder):
    shards = ShardReader(shard_folder(3, 1, 4))
    for i in (7, 0, 3, 2, 7, 4):
        sample = shards.read(i)
        assert (sample.key, sample.image) == (f"{i:04}", picture(i))
        assert sample.captions == [f"number {i}"]
    assert shards.sample_name(3).endswith("00001.tar: sample '0003'")


def test_many_shards_need_few_open_files(shard_folder):
    shards = ShardReader(shard_folder(*[1] * 100))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert [shards.read(i).key for i in range(100)] == [f"{i:04}" for i in range(100)]
    assert len(os.listdir("/proc/self/fd")) - before <= 64


def test_open_files_are_not_pickled(shard_folder):
    shards = ShardReader(shard_folder(2, 2))
    shards.read(3)
    copy = pickle.loads(pickle.dumps(shards))
    assert copy.read(3) == shards.read(3)


def test_a_shard_that_changes_in_use_is_an_error(shard_folder):
    folder = shard_folder(2, 2)
    shards = ShardReader(folder)
    shards.read(0)
    with open(folder / "00000.tar", "r+b") as file:
        file.truncate(600)
    with pytest.raises(ShardError, match=r"00000\.tar changed since"):
        shards.read(1)
    (folder / "00001.tar").write_bytes(tar_bytes(samples(30)))
    with pytest.raises(ShardError, match=r"00001\.tar changed since"):
        shards.read(2)
