"""Samples in tar shards (the webdataset format): written to whole shards, read by number.

Nothing is unpacked to disk. webdataset's decoders and openers, which run code that members and
names ask for, are not used.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from webdataset import TarWriter

from ldm.data.captions import parse_json_object, read_sample_captions, read_weighted_captions
from ldm.data.shards.index import DEFAULT_READ_OPTIONS, ReadOptions, open_index
from ldm.data.shards.locations import ShardSource
from ldm.data.shards.remote import RemoteShard
from ldm.data.shards.tar_headers import ShardError
from ldm.utils.files import replace_file

_MAX_OPEN = 64
_MAX_OPEN_REMOTE = 8  # an open one cannot be deleted from the cache


@dataclass(frozen=True)
class Sample:
    """One encoded image and its captions (at least one, which may be empty).

    weights: how often to draw each caption; None: equally often.
    """

    key: str
    image: bytes
    captions: list[str]
    weights: list[float] | None = None


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> int:
    """Writes (key, {suffix: bytes}) samples to one whole shard and returns their number."""
    count = 0
    with replace_file(path) as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for key, members in samples:
            tar.write({"__key__": key, **members})
            count += 1
    return count


class ShardReader:
    """Random access to the samples of a source; raises like `open_index`."""

    def __init__(self, source: ShardSource, options: ReadOptions = DEFAULT_READ_OPTIONS) -> None:
        self.index = open_index(source, options)
        self._cache = options.cache
        self._files: dict[int, FileIO] = {}
        is_remote = any(isinstance(path, RemoteShard) for path in self.index.paths)
        self._max_open = _MAX_OPEN_REMOTE if is_remote else _MAX_OPEN

    def __len__(self) -> int:
        return len(self.index)

    def read(self, i: int) -> Sample:
        """Returns sample i in 0..N-1, in shard order; ShardError if the shard has changed."""
        shard = int(self.index.shard[i])
        image, txt, record = (self._read_member(shard, *at) for at in self.index.locations(i))
        keys, weights = self.index.caption_weights, None
        if len(keys) > 1:
            captions, weights = read_weighted_captions(record, keys)
        else:
            captions = read_sample_captions(txt, record, key=next(iter(keys), None))
        return Sample(self.index.key(i), image or b"", captions, weights)

    def read_fields(self, i: int) -> dict[str, Any]:
        """Returns the json of sample i, empty if it has none."""
        shard, (_, _, record) = int(self.index.shard[i]), self.index.locations(i)
        return parse_json_object(self._read_member(shard, *record))

    def open_sample(self, i: int) -> tuple[int, list[tuple[int, int]]]:
        """Returns an open file of sample i's shard, and where its members are, see `locations`."""
        shard = int(self.index.shard[i])
        return self._open(shard).fileno(), self.index.locations(i)

    def sample_name(self, i: int) -> str:
        """Returns shard and key of sample i, for messages."""
        return f"{self.index.paths[self.index.shard[i]]}: sample '{self.index.key(i)}'"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # other processes open files of their own

    def _read_member(self, shard: int, offset: int, size: int) -> bytes | None:
        if offset == 0:
            return None
        path = self.index.paths[shard]
        try:
            data = os.pread(self._open(shard).fileno(), size, offset)
        except OSError as error:
            if isinstance(path, RemoteShard):
                raise
            raise ShardError(f"{path} cannot be read: {error.strerror}") from error
        if len(data) != size:
            raise ShardError(f"{path} was cut short while in use")
        return data

    def _open(self, shard: int) -> FileIO:
        path = self.index.paths[shard]
        if shard not in self._files:
            file = self._cache.open(path) if isinstance(path, RemoteShard) else FileIO(path)
            if len(self._files) >= self._max_open:
                self._close(next(iter(self._files)))
            self._files[shard] = file
        if not isinstance(path, RemoteShard):
            stat = os.fstat(self._files[shard].fileno())
            if [stat.st_size, stat.st_mtime_ns] != self.index.stamps[shard]:
                self._close(shard)
                raise ShardError(f"{path} changed since it was indexed; restart")
        return self._files[shard]

    def _close(self, shard: int) -> None:
        file = self._files.pop(shard)
        if isinstance(self.index.paths[shard], RemoteShard):
            self._cache.close(file)
        else:
            file.close()
