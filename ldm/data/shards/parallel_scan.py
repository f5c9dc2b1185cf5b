"""Scans many shards at once: local ones in processes, those of servers in threads."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from io import FileIO, IOBase
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Any

import numpy as np
from tqdm import tqdm

from ldm.data.image_decoding import ImageError, read_image_size
from ldm.data.shards.cache import ShardCache
from ldm.data.shards.remote import REMOTE_THREADS, NoRangesError, RemoteShard
from ldm.data.shards.tar_headers import RemoteFile, ShardScan, scan_tar
from ldm.data.shards.webshart_index import scan_webshart_index

_MAX_SERIAL_SHARDS = 32  # for fewer, starting processes takes longer
_HEAD_BYTES = 2**16


def scan_in_parallel(
    paths: list[Path | RemoteShard], cache: ShardCache | None, keys: Sequence[str] = ()
) -> Iterator[ShardScan]:
    """Yields what each shard holds, in order; raises like `scan_tar` and `read_range`."""
    scan = partial(_scan, cache=cache, keys=keys)
    return _map_shards(scan, paths, description="indexing shards")


def measure_images(
    paths: list[Path | RemoteShard],
    shard: np.ndarray,
    images: np.ndarray,
    sizes: np.ndarray,
    cache: ShardCache | None,
) -> np.ndarray:
    """Returns `sizes` (N, 2) with the unmeasured ones read from the images' headers.

    images (N, 2): offset in blocks and size in bytes; a header that cannot be read gives (0, 0).
    """
    missing = (sizes < 0).any(axis=1)
    counts = np.bincount(shard[missing], minlength=len(paths))
    used = np.flatnonzero(counts)
    parts = np.split(images[missing], np.cumsum(counts[used])[:-1])
    measure = partial(_measure_shard, cache=cache)
    found = _map_shards(measure, [paths[i] for i in used], parts, description="measuring images")
    sizes = sizes.copy()
    sizes[missing] = np.concatenate([*found, np.empty((0, 2), np.int32)])
    return sizes


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


def _scan(path: Path | RemoteShard, cache: ShardCache | None, keys: Sequence[str]) -> ShardScan:
    if (found := scan_webshart_index(path, keys)) is not None:
        return found
    return _use_file(path, cache, lambda file: scan_tar(file, str(path), keys))


def _measure_shard(
    path: Path | RemoteShard, images: np.ndarray, cache: ShardCache | None
) -> np.ndarray:
    def measure(file: IOBase) -> list[tuple[int, int]]:
        return [_measure_image(file, at * BLOCKSIZE, size) for at, size in images.tolist()]

    return np.array(_use_file(path, cache, measure), np.int32)


def _measure_image(file: IOBase, offset: int, size: int) -> tuple[int, int]:
    for length in sorted({min(_HEAD_BYTES, size), size}):  # a long ICC profile may come first
        file.seek(offset)
        try:
            return read_image_size(file.read(length))
        except ImageError:
            pass
    return 0, 0


def _use_file(
    path: Path | RemoteShard, cache: ShardCache | None, use: Callable[[IOBase], Any]
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
