"""Scans many shards at once: local ones in processes, those of servers in threads."""

import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from io import FileIO, RawIOBase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ldm.data.captions import CaptionCount
from ldm.data.image_decoding import ImageError, read_short_side
from ldm.data.shards.cache import ShardCache
from ldm.data.shards.remote import REMOTE_THREADS, NoRangesError, RemoteShard
from ldm.data.shards.tar_headers import RemoteFile, scan_tar

TAR_BLOCK_BYTES = 512  # tar aligns members to this
_MAX_SERIAL_SHARDS = 32  # for fewer, starting processes takes longer
_HEAD_BYTES = 2**16


class ShardArrays(NamedTuple):
    """A ShardScan with keys and members as the arrays of a ShardIndex."""

    key_bytes: bytes
    key_lengths: np.ndarray
    members: np.ndarray
    skipped: Counter[str]
    captions: CaptionCount
    sparse: str | None


def scan_in_parallel(
    paths: list[Path | RemoteShard], cache: ShardCache | None
) -> Iterator[ShardArrays]:
    """Yields what each shard holds, in order; raises like `scan_tar` and `read_range`."""
    scan = partial(_scan_to_arrays, cache=cache)
    return _map_shards(scan, paths, description="indexing shards")


def measure_short_sides(
    paths: list[Path | RemoteShard],
    shard: np.ndarray,
    members: np.ndarray,
    cache: ShardCache | None,
) -> np.ndarray:
    """Returns the short side (N,) int32 of each image, by its header; 0 if it cannot be read."""
    ends = np.cumsum(np.bincount(shard, minlength=len(paths)))
    parts = np.split(members[:, 0], ends[:-1])
    measure = partial(_measure_shard, cache=cache)
    sides = _map_shards(measure, paths, parts, description="measuring images")
    return np.concatenate(list(sides))


def _map_shards(
    fn: Callable, paths: list[Path | RemoteShard], *parts: Sequence, description: str
) -> Iterator[Any]:
    if any(isinstance(path, RemoteShard) for path in paths):
        pool = ThreadPoolExecutor(REMOTE_THREADS)
    elif len(paths) > _MAX_SERIAL_SHARDS:
        # Forked like data workers: importing all of this again takes longer than a scan.
        context = multiprocessing.get_context("fork")
        pool = ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context)
    else:
        pool = None
    try:
        results = pool.map(fn, paths, *parts) if pool else map(fn, paths, *parts)
        yield from tqdm(results, description, total=len(paths), unit="shard", delay=2)
    finally:
        if pool:
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
    def measure(file: RawIOBase) -> list[int]:
        return [_measure_image(file, at * TAR_BLOCK_BYTES, size) for at, size in images.tolist()]

    return np.array(_use_file(path, cache, measure), np.int32)


def _measure_image(file: RawIOBase, offset: int, size: int) -> int:
    for length in sorted({min(_HEAD_BYTES, size), size}):  # a long ICC profile may come first
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


def _use_file(
    path: Path | RemoteShard, cache: ShardCache | None, use: Callable[[RawIOBase], Any]
) -> Any:
    """Calls `use(file)` on the shard, or on a whole copy if its server supports no ranges."""
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
