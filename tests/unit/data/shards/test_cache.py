import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from material import samples, tar_bytes

from ldm.data.shards import remote
from ldm.data.shards.cache import CACHE_MARKER, ShardCache
from ldm.data.shards.index import ReadOptions
from ldm.data.shards.reader import ShardReader
from ldm.data.shards.remote import RemoteError, RemoteShard, describe_urls

SIZE = len(tar_bytes(samples(3)))


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(remote, "RETRY_WAIT", 0.01)
    monkeypatch.setattr(remote, "STALL_TIMEOUT", 0.4)


@pytest.fixture
def shards(web) -> list[RemoteShard]:
    """Six shards of three samples."""
    for n in range(6):
        web.files[f"/{n}.tar"] = tar_bytes(samples(3, first=3 * n))
    return describe_urls([web.url(name) for name in web.files])


def room_for(tmp_path: Path, count: int) -> ShardCache:
    return ShardCache(tmp_path / "cache", gigabytes=(count * SIZE + 10) / 1e9)


def held(cache: ShardCache) -> list[str]:
    return sorted(path.name.split("-")[-1] for path in cache.folder.glob("*.tar*"))


def gets(web) -> list[str]:
    return [name for method, name, _ in web.seen if method == "GET"]


def test_the_least_recently_used_shard_is_deleted(tmp_path, shards, web):
    cache = room_for(tmp_path, 3)
    for n in (0, 1, 2, 0, 3, 4):
        cache.close(cache.open(shards[n]))
        time.sleep(0.01)
    assert held(cache) == ["0.tar", "3.tar", "4.tar"]
    assert gets(web) == [f"/{n}.tar" for n in (0, 1, 2, 3, 4)]
    cache.close(cache.open(shards[0]))
    assert gets(web)[5:] == []


def test_shards_in_use_stay(tmp_path, shards, caplog):
    cache = room_for(tmp_path, 2)
    first, second = cache.open(shards[0]), cache.open(shards[1])
    with caplog.at_level(logging.WARNING):
        cache.close(cache.open(shards[2]))
        cache.close(cache.open(shards[3]))
    assert held(cache) == ["0.tar", "1.tar", "3.tar"]
    assert caplog.text.count("all in use") == 1
    assert os.pread(first.fileno(), 4, 0) == b"0000"
    cache.close(first)
    cache.close(second)
    cache.close(cache.open(shards[4]))
    assert len(held(cache)) == 2


def test_a_shard_larger_than_the_cache_is_refused(tmp_path, shards):
    with pytest.raises(
        ValueError, match=r"0\.tar has .* GB and does not fit .* raise data.cache_gb"
    ):
        ShardCache(tmp_path / "cache", gigabytes=(SIZE - 1) / 1e9).open(shards[0])
    with pytest.raises(ValueError, match="cache_gb must be above 0"):
        ShardCache(tmp_path, gigabytes=0)


def test_a_damaged_copy_is_fetched_again(tmp_path, shards):
    cache = room_for(tmp_path, 2)
    cache.close(cache.open(shards[0]))
    (copy,) = cache.folder.glob("*.tar")
    copy.write_bytes(b"short")
    file = cache.open(shards[0])
    assert file.read() == tar_bytes(samples(3))


def test_a_failed_download_leaves_no_shard_and_no_lock(tmp_path, shards, web):
    cache = room_for(tmp_path, 2)
    web.first("500", 3)
    with pytest.raises(RemoteError):
        cache.open(shards[0])
    assert held(cache) == ["0.tar.part"]
    cache.close(cache.open(shards[0]))
    assert held(cache) == ["0.tar"]


def many(cache: ShardCache, shards: list[RemoteShard], order: list[int], out) -> None:
    for n in order:
        file = cache.open(shards[n])
        out.put((n, file.read() == tar_bytes(samples(3, first=3 * n))))
        time.sleep(0.02)
        cache.close(file)


def test_processes_share_a_cache(tmp_path, shards, web):
    """Each shard comes once where there is room; where there is not, every read is right still."""
    web.delay = 0.05
    context = multiprocessing.get_context("fork")
    for room in (6, 3):
        cache = ShardCache(tmp_path / str(room), gigabytes=(room * SIZE + 10) / 1e9)
        web.seen.clear()
        out = context.SimpleQueue()
        orders = [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 2, 4, 1, 3, 5]]
        jobs = [context.Process(target=many, args=(cache, shards, o, out)) for o in orders]
        for job in jobs:
            job.start()
        read = [out.get() for _ in range(18)]
        for job in jobs:
            job.join()
        assert sorted(read) == sorted((n, True) for order in orders for n in order)
        if room == 6:
            assert sorted(gets(web)) == sorted(web.files)
        assert len(held(cache)) <= room


def test_a_killed_download_blocks_nobody_and_goes_on(tmp_path, shards, web, monkeypatch):
    monkeypatch.setattr(remote, "_CHUNK", 1024)
    monkeypatch.setattr(remote, "STALL_TIMEOUT", 30)
    web.fault = lambda method, name, span: "stall" if span and span >= "bytes=4096" else None
    cache = room_for(tmp_path, 2)
    context = multiprocessing.get_context("fork")
    job = context.Process(target=many, args=(cache, shards, [0], context.SimpleQueue()))
    job.start()
    while ("GET", "/0.tar", "bytes=4096-5119") not in web.seen:
        time.sleep(0.01)
    os.kill(job.pid, signal.SIGKILL)
    job.join()
    assert held(cache) == ["0.tar.part"]
    web.fault = lambda *request: None
    web.seen.clear()
    file = cache.open(shards[0])
    assert file.read() == tar_bytes(samples(3))
    assert web.seen[0] == ("GET", "/0.tar", "bytes=4096-5119")


def test_an_abandoned_part_is_deleted(tmp_path, shards, web):
    cache = room_for(tmp_path, 2)
    web.first("500", 3)
    with pytest.raises(RemoteError):
        cache.open(shards[0])
    for n in (1, 2):
        cache.close(cache.open(shards[n]))
    assert held(cache) == ["1.tar", "2.tar"]


FOREIGN = (
    *("IMG-20240101-WA0001.jpg", "a-5-b.tar", "0123456789abcdef-5", "0123456789ABCDEF-5-x.tar"),
    *("0123456789abcdef-5-x y.tar", "0123456789abcdef0-5-x.tar", "0123456789abcdef--5-x.tar"),
    *("index-5-x.npz", "notes-2024-05.txt", "0123456789abcdef-5-x.tar.part.bak~"),
)


@pytest.mark.parametrize("name", FOREIGN)
def test_files_that_are_no_shards_are_never_deleted(tmp_path, shards, name):
    cache = room_for(tmp_path, 1)
    cache.close(cache.open(shards[0]))
    (cache.folder / name).write_text("mine")
    os.utime(cache.folder / name, (0, 0))  # the first to leave
    for n in (1, 2):
        cache.close(cache.open(shards[n]))
    assert [path.name[-5:] for path in cache.folder.glob(f"*-{SIZE}-*")] == ["2.tar"]
    assert (cache.folder / name).read_text() == "mine"


def test_a_folder_with_other_files_is_no_cache(tmp_path, shards, web):
    """Not even a file of our form leaves a folder that we have not marked."""
    cache, name = room_for(tmp_path, 1), f"{'0' * 16}-{SIZE}-x.tar"
    cache.folder.mkdir()
    for place in (name, "thesis.txt"):
        (cache.folder / place).write_text("mine")
    with pytest.raises(ValueError, match=r"cache holds 'thesis\.txt', and is no cache: give a new"):
        cache.open(shards[0])
    assert gets(web) == []
    assert sorted(path.name for path in cache.folder.iterdir()) == [name, "thesis.txt"]


def test_an_old_cache_without_marker_is_accepted(tmp_path, shards):
    cache = room_for(tmp_path, 1)
    cache.close(cache.open(shards[0]))
    (cache.folder / CACHE_MARKER).unlink()
    (cache.folder / "index-0123456789abcdef.npz").write_bytes(b"")
    (cache.folder / "clip").mkdir()
    cache.close(cache.open(shards[1]))
    assert held(cache) == ["1.tar"]
    assert (cache.folder / CACHE_MARKER).is_file()


def test_shards_are_read_through_a_small_cache(tmp_path, shards, web):
    cache = room_for(tmp_path, 9)
    read = ShardReader([shard.url for shard in shards], ReadOptions(cache=cache))
    assert len(read) == 18
    for i in (17, 0, 9, 4, 13, 2, 6, 17):
        sample = read.read(i)
        assert (sample.key, sample.captions) == (f"{i:04}", [f"number {i}"])
    assert read.sample_name(17).endswith("/5.tar: sample '0017'")
    with pytest.raises(ValueError, match=r"data\.cache=FOLDER"):
        ShardReader(shards[0].url)
