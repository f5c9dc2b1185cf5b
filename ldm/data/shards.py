"""Samples in tar shards (the webdataset format): written whole, read by number.

Nothing is unpacked to disk, and webdataset's decoders and openers, which run what members and
names tell them to, are not used.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from webdataset import TarWriter

from ldm.data.captions import sample_captions
from ldm.data.index import ShardError, open_index
from ldm.files import replacing

_MAX_OPEN = 64


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
    with replacing(path) as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for key, members in samples:
            tar.write({"__key__": key, **members})
            count += 1
    return count


class Shards:
    """Random access to the samples of a folder (or list) of .tar shards.

    Raises FileNotFoundError and ShardError as `open_index` does.
    """

    def __init__(self, source: str | Path | Sequence[str | Path]) -> None:
        self.index = open_index(source)
        self._files: dict[int, FileIO] = {}

    def __len__(self) -> int:
        return len(self.index)

    def read(self, i: int) -> Sample:
        """Sample i in 0..N-1, in shard order.

        Raises ShardError where the shard is no longer what was indexed.
        """
        shard = int(self.index.shard[i])
        image, txt, record = (
            self._member(shard, offset, size) for offset, size in self.index.members[i].tolist()
        )
        return Sample(self.index.key(i), image or b"", sample_captions(txt, record))

    def name(self, i: int) -> str:
        """Shard and key of sample i, for messages."""
        return f"{self.index.paths[self.index.shard[i]]}: sample '{self.index.key(i)}'"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # open files do not travel to other processes

    def _member(self, shard: int, offset: int, size: int) -> bytes | None:
        if offset == 0:
            return None
        data = os.pread(self._file(shard).fileno(), size, offset)
        if len(data) != size:
            raise ShardError(f"{self.index.paths[shard]} was cut short while in use")
        return data

    def _file(self, shard: int) -> FileIO:
        if shard not in self._files:
            file = FileIO(self.index.paths[shard])
            if os.fstat(file.fileno()).st_size != self.index.stamps[shard][0]:
                file.close()
                raise ShardError(f"{self.index.paths[shard]} changed since it was indexed; restart")
            if len(self._files) >= _MAX_OPEN:
                self._files.pop(next(iter(self._files))).close()
            self._files[shard] = file
        return self._files[shard]
