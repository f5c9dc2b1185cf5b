"""Many shards scanned side by side: local ones by processes, those of servers by threads."""

import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from io import FileIO, RawIOBase
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ldm.data.captions import CaptionCount
from ldm.data.image_decoding import ImageError, read_short_side
from ldm.data.shards.cache import ShardCache
from ldm.data.shards.remote import REMOTE_THREADS, NoRangesError, RemoteShard
from ldm.data.shards.tar_headers import RemoteFile, scan_tar

TAR_BLOCK_BYTES = 512  # tar keeps every member at a multiple of this
_MAX_SERIAL_SHARDS = 32  # shards for which no process is started
_HEAD_BYTES = 2**16


class ShardArrays(NamedTuple):
    """A shard's samples, as the arrays of `Index` have them, and what was left out."""

    key_bytes: bytes
    key_lengths: np.ndarray
    members: np.ndarray
    skipped: Counter[str]
    captions: CaptionCount
    sparse: str | None


def scan_in_parallel(
    paths: list[Path | RemoteShard], cache: ShardCache | None
) -> Iterator[ShardArrays]:
    """What each shard holds, in order; ShardError as `scan`, RemoteError as `read_range`."""
    with _open_pool(paths) as pool:
        found = pool.map(partial(_scan_to_arrays, cache=cache), paths)
        yield from tqdm(found, "indexing shards", total=len(paths), unit="shard", delay=2)


def measure_short_sides(
    paths: list[Path | RemoteShard],
    shard: np.ndarray,
    members: np.ndarray,
    cache: ShardCache | None,
) -> np.ndarray:
    """The short side (N,) int32 of each picture by its header, 0 where that cannot be read."""
    ends = np.cumsum(np.bincount(shard, minlength=len(paths)))
    parts = np.split(members[:, 0], ends[:-1])
    with _open_pool(paths) as pool:
        found = pool.map(partial(_measure_shard, cache=cache), paths, parts)
        bar = tqdm(found, "measuring pictures", total=len(paths), unit="shard", delay=2)
        return np.concatenate(list(bar))


class _SerialExecutor(Executor):
    def map(self, fn, *iterables):
        return map(fn, *iterables)


@contextmanager
def _open_pool(paths: list[Path | RemoteShard]) -> Iterator[Executor]:
    if any(isinstance(path, RemoteShard) for path in paths):
        pool = ThreadPoolExecutor(REMOTE_THREADS)
    elif len(paths) <= _MAX_SERIAL_SHARDS:
        pool = _SerialExecutor()
    else:
        # Forked, as data workers are: to import all of this again would take longer than to scan.
        context = multiprocessing.get_context("fork")
        pool = ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _scan_to_arrays(path: Path | RemoteShard, cache: ShardCache | None) -> ShardArrays:
    keys, rows, *others = _use_file(path, cache, lambda file: scan_tar(file, str(path)))
    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    members = np.array(rows, np.int64).reshape(-1, 3, 2)
    members[..., 0] //= TAR_BLOCK_BYTES
    lengths = np.array([len(key) for key in encoded], np.int32)
    return ShardArrays(b"".join(encoded), lengths, members.astype(np.uint32), *others)


def _measure_shard(
    path: Path | RemoteShard, images: np.ndarray, cache: ShardCache | None
) -> np.ndarray:
    def sides(file: RawIOBase) -> np.ndarray:
        return np.array(
            [
                _measure_image(file, block * TAR_BLOCK_BYTES, size)
                for block, size in images.tolist()
            ],
            np.int32,
        )

    return _use_file(path, cache, sides)


def _measure_image(file: RawIOBase, offset: int, size: int) -> int:
    for length in sorted({min(_HEAD_BYTES, size), size}):  # a long profile may come before the size
        file.seek(offset)
        try:
            return read_short_side(_read_exactly(file, length))
        except ImageError:
            pass
    return 0


def _read_exactly(file: RawIOBase, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := file.read(size - len(data))):
        data += more
    return data


def _use_file(path: Path | RemoteShard, cache: ShardCache | None, use):
    """`use(file)` on the shard where it is, or on a whole copy where its server has no ranges."""
    if not isinstance(path, RemoteShard):
        with FileIO(path) as file:
            return use(file)
    try:
        return use(RemoteFile(path))
    except NoRangesError:
        file = cache.open(path)
        try:
            return use(file)
        finally:
            cache.close(file)
