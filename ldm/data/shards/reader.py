"""Samples in tar shards (the webdataset format): written whole, read by number.

Nothing is unpacked to disk, and webdataset's decoders and openers, which run what members and
names tell them to, are not used.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Literal

from webdataset import TarWriter

from ldm.data.captions import read_sample_captions
from ldm.data.shards.cache import ShardCache
from ldm.data.shards.index import open_index
from ldm.data.shards.locations import ShardSource
from ldm.data.shards.remote import RemoteShard
from ldm.data.shards.tar_headers import ShardError
from ldm.utils.files import replace_file

_MAX_OPEN = 64
_MAX_OPEN_REMOTE = 8  # an open one cannot leave the cache


@dataclass(frozen=True)
class Sample:
    """One picture, still encoded, and its captions (at least one, perhaps empty)."""

    key: str
    image: bytes
    captions: list[str]


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> int:
    """Write (key, {suffix: bytes}) samples to one shard and return how many there were.

    The same samples give the same bytes. A shard under its final name is complete.
    """
    count = 0
    with replace_file(path) as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for key, members in samples:
            tar.write({"__key__": key, **members})
            count += 1
    return count


class ShardReader:
    """Random access to the samples of a folder, URL or list of .tar shards.

    What lies on servers is read from whole copies in the `cache`. `caption_key`: see
    `sample_captions`; `min_size`, `read_only`, `on_error`, errors: see `open_index`.
    """

    def __init__(
        self,
        source: ShardSource,
        *,
        min_size: int | None = None,
        cache: ShardCache | None = None,
        read_only: bool = False,
        caption_key: str | None = None,
        on_error: Literal["stop", "skip"] = "stop",
    ) -> None:
        how = {"min_size": min_size, "cache": cache, "on_error": on_error}
        self.index = open_index(source, **how, caption_key=caption_key, read_only=read_only)
        self._cache = cache
        self._files: dict[int, FileIO] = {}
        remote = any(isinstance(path, RemoteShard) for path in self.index.paths)
        self._most = _MAX_OPEN_REMOTE if remote else _MAX_OPEN

    def __len__(self) -> int:
        return len(self.index)

    def read(self, i: int) -> Sample:
        """Sample i in 0..N-1, in shard order.

        Raises ShardError where the shard is no longer what was indexed or cannot be read.
        """
        shard = int(self.index.shard[i])
        image, txt, record = (
            self._member(shard, offset, size) for offset, size in self.index.places(i)
        )
        captions = read_sample_captions(txt, record, key=self.index.caption_key)
        return Sample(self.index.key(i), image or b"", captions)

    def name(self, i: int) -> str:
        """Shard and key of sample i, for messages."""
        return f"{self.index.paths[self.index.shard[i]]}: sample '{self.index.key(i)}'"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # open files do not travel to other processes

    def _member(self, shard: int, offset: int, size: int) -> bytes | None:
        if offset == 0:
            return None
        path = self.index.paths[shard]
        try:
            data = os.pread(self._file(shard).fileno(), size, offset)
        except OSError as error:
            if isinstance(path, RemoteShard):
                raise
            raise ShardError(f"{path} cannot be read: {error.strerror}") from error
        if len(data) != size:
            raise ShardError(f"{path} was cut short while in use")
        return data

    def _file(self, shard: int) -> FileIO:
        path = self.index.paths[shard]
        if shard not in self._files:
            file = self._cache.open(path) if isinstance(path, RemoteShard) else FileIO(path)
            if len(self._files) >= self._most:
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
