"""Finds the samples of one tar shard by its headers alone.

Shapes: 3 members a sample (image, txt, json), 2 numbers a member (offset, size) in bytes.
"""

import io
import itertools
import tarfile
from collections import Counter
from collections.abc import Iterator
from io import BufferedReader, FileIO, RawIOBase
from pathlib import Path
from typing import NamedTuple

from ldm.data.captions import CaptionCount
from ldm.data.image_decoding import MAX_IMAGE_BYTES
from ldm.data.shards.remote import RemoteShard, read_range

MAX_TEXT_BYTES = 2**20
MAX_HEADER_BYTES = 2**20
SPARSE_MEMBER = "sparse member"

_MEMBERS = ("image", "txt", "json")
_COLUMN = {"jpg": 0, "jpeg": 0, "png": 0, "webp": 0, "txt": 1, "json": 2}
_LIMITS = (MAX_IMAGE_BYTES, MAX_TEXT_BYTES, MAX_TEXT_BYTES)
_MAX_PADDING = 16 * 2**20  # tar pads to 10 KiB by default
_END = bytes(2 * tarfile.BLOCKSIZE)


class ShardError(ValueError):
    """A damaged tar archive, or shards without a single usable sample."""


class TarMember(NamedTuple):
    """A regular file of an archive; text: its content if that may be a caption."""

    key: str
    suffix: str
    offset: int
    size: int
    text: bytes | None
    is_sparse: bool


class ShardScan(NamedTuple):
    """The usable samples of a shard, and how many others it has, by reason.

    rows: members (offset, size) x (image, txt, json) of each key; sparse: name of the first sparse
    member.
    """

    keys: list[str]
    rows: list[list[tuple[int, int]]]
    skipped: Counter[str]
    captions: CaptionCount
    sparse: str | None


def scan_shard(path: Path) -> ShardScan:
    with FileIO(path) as file:
        return scan_tar(file, str(path))


def scan_tar(file: RawIOBase, name: str) -> ShardScan:
    """Groups members as webdataset does: neighbours with the same name up to the first dot.

    Links and devices are ignored. Raises ShardError, with `name`, if the archive is damaged.
    """
    keys, rows, skipped, captions, sparse = {}, [], Counter(), CaptionCount(), None
    for key, members in itertools.groupby(_iterate_members(file, name), key=lambda m: m.key):
        group = list(members)
        row, reason = _locate_members(group)
        if not reason and key in keys:
            reason = "key seen before in its shard"
        if reason == SPARSE_MEMBER:
            sparse = sparse or next(f"{key}.{one.suffix}" for one in group if one.is_sparse)
        if reason:
            skipped[reason] += 1
        else:
            keys[key] = None
            rows.append(row)
            texts = {_COLUMN[one.suffix]: one.text for one in group if one.suffix in _COLUMN}
            captions.add(texts.get(1), texts.get(2))
    return ShardScan(list(keys), rows, skipped, captions, sparse)


class RemoteFile(RawIOBase):
    """A shard on its server as a file that is read in blocks; raises like `read_range`."""

    def __init__(self, remote: RemoteShard, block: int = 2**16) -> None:
        self._remote, self._block = remote, block
        self._at, self._first, self._data = 0, 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._remote.size}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer) -> int:
        if self._at >= self._remote.size:
            return 0
        if not self._first <= self._at < self._first + len(self._data):
            end = min(self._at + self._block, self._remote.size)
            self._data, self._first = read_range(self._remote, self._at, end), self._at
        start = self._at - self._first
        count = min(len(buffer), len(self._data) - start)
        buffer[:count] = self._data[start : start + count]
        self._at += count
        return count


def _locate_members(group: list[TarMember]) -> tuple[list[tuple[int, int]], str | None]:
    """Returns the members of one sample by column, and the reason if it is unusable."""
    row = [(0, 0)] * 3
    for member in group:
        column = _COLUMN.get(member.suffix)
        if column is None:
            continue
        if member.is_sparse:
            return row, SPARSE_MEMBER
        if row[column] != (0, 0):
            return row, f"more than one {_MEMBERS[column]}"
        if member.size > _LIMITS[column]:
            return row, f"{_MEMBERS[column]} over {_LIMITS[column] >> 20} MB"
        row[column] = (member.offset, member.size)
    image, txt, record = row
    if image == (0, 0):
        return row, "no image"
    return row, "no caption" if txt == record == (0, 0) else None


def _iterate_members(raw: RawIOBase, name: str) -> Iterator[TarMember]:
    length = raw.seek(0, io.SEEK_END)
    raw.seek(0)
    file = _HeaderReader(raw)
    try:
        with tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # a million headers need not stay in memory
                at, size = member.offset_data, member.size
                # Sparse in GNU's old format or in those of pax: its size is not that of its bytes.
                is_sparse = member.issparse() or any(
                    key.startswith("GNU.sparse.") for key in member.pax_headers
                )
                if not is_sparse and not 0 <= size <= length - at:
                    raise ShardError(f"member '{member.name}' ends outside the file")
                folder, slash, base = member.name.rpartition("/")
                stem, dot, suffix = base.partition(".")
                if stem and dot and member.isreg():
                    suffix, text = suffix.lower(), None
                    if suffix in ("txt", "json") and not is_sparse and size <= MAX_TEXT_BYTES:
                        file.seek(at)
                        text = file.read(size)
                    yield TarMember(folder + slash + stem, suffix, at, size, text, is_sparse)
            _check_end(file, tar.offset, length)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise ShardError(
            f"{name} is no intact tar archive ({_identify_file(raw) or error}); "
            "fetch or write it again, or move it out of the folder"
        ) from error
    finally:
        file.detach()  # closing it would close `raw`


def _check_end(file: BufferedReader, offset: int, length: int) -> None:
    """Raises ShardError if there is no end mark at `offset`: tarfile stops at any non-header."""
    file.seek(offset)
    if file.read(len(_END)) != _END:
        raise ShardError(f"no end mark after the last member, at byte {offset}")
    if length - offset > _MAX_PADDING:
        raise ShardError(f"{length - offset:,} bytes from the end mark at byte {offset} on")
    while chunk := file.read(MAX_HEADER_BYTES):
        if chunk.count(0) != len(chunk):
            raise ShardError(f"data after the end mark at byte {offset}; are two archives joined?")


def _identify_file(raw: RawIOBase) -> str | None:
    raw.seek(0)
    head = raw.read(2)
    if head == b"\x1f\x8b":
        return "it is gzip-compressed: unpack it with gunzip, shards are read at offsets"
    return None if head else "it is empty"


class _HeaderReader(BufferedReader):
    """A file for tarfile that refuses a header which claims to be gigabytes long."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        return super().read(size)
