"""Finds the samples of one tar shard by its headers alone."""

import io
import itertools
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from io import BufferedReader, FileIO, IOBase
from pathlib import Path
from typing import NamedTuple

import numpy as np
from fsspec.spec import AbstractBufferedFile

from ldm.data.captions import CaptionCount, read_cached_size
from ldm.data.image_decoding import MAX_IMAGE_BYTES
from ldm.data.shards.json_columns import JsonColumns, tabulate_records
from ldm.data.shards.remote import RemoteShard, read_range

MAX_TEXT_BYTES = 2**20
MAX_HEADER_BYTES = 2**20
SPARSE_MEMBER = "sparse member"
UNMEASURED = (-1, -1)  # the size of an image whose header is not read yet

_MEMBERS = ("image", "txt", "json")
_PLACE = {"jpg": 0, "jpeg": 0, "png": 0, "webp": 0, "txt": 1, "json": 2}
_CACHED_PLACE = {**_PLACE, "safetensors": 0}  # of samples without a picture, as caches have them
_LIMITS = (MAX_IMAGE_BYTES, MAX_TEXT_BYTES, MAX_TEXT_BYTES)
MAX_PADDING = 16 * 2**20  # tar pads to 10 KiB by default
_END = bytes(2 * tarfile.BLOCKSIZE)


class ShardError(ValueError):
    """A damaged tar archive, or shards without a single usable sample."""


class TarMember(NamedTuple):
    """A regular file of an archive; text: its content if that may be a caption.

    image_size: (width, height) in pixels, if an index has it.
    """

    key: str
    suffix: str
    offset: int
    size: int
    text: bytes | None
    is_sparse: bool
    image_size: tuple[int, int] = UNMEASURED


class ShardScan(NamedTuple):
    """The usable samples of a shard, as a ShardIndex has them; skipped: the others, by reason."""

    keys: list[bytes]
    members: np.ndarray
    skipped: Counter[str]
    captions: CaptionCount
    sparse: str | None
    sizes: np.ndarray
    columns: JsonColumns


def scan_shard(path: Path) -> ShardScan:
    with FileIO(path) as file:
        return scan_tar(file, str(path))


def scan_tar(file: IOBase, name: str, keys: Sequence[str] = ()) -> ShardScan:
    """Returns what a shard holds, with the values that the samples' json has under `keys`."""
    return group_members(_iterate_members(file, name), keys)


def group_members(members: Iterable[TarMember], columns: Sequence[str] = ()) -> ShardScan:
    """Groups members as webdataset does: neighbours with the same name up to the first dot."""
    records: list[bytes | None] = []
    keys, rows, skipped, captions, sparse = {}, [], Counter(), CaptionCount(), None
    sizes = []
    for key, neighbours in itertools.groupby(members, key=lambda member: member.key):
        group = list(neighbours)
        places = _choose_places(group)
        row, reason = _locate_members(group, places)
        if not reason and key in keys:
            reason = "key seen before in its shard"
        if reason == SPARSE_MEMBER:
            sparse = sparse or next(f"{key}.{one.suffix}" for one in group if one.is_sparse)
        if reason:
            skipped[reason] += 1
        else:
            keys[key] = None
            rows.append(row)
            texts = {places[one.suffix]: one.text for one in group if one.suffix in places}
            captions.add(texts.get(1), texts.get(2))
            size = next(one.image_size for one in group if places.get(one.suffix) == 0)
            sizes.append(size if places is _PLACE else read_cached_size(texts.get(2)))
            if columns:
                records.append(texts.get(2))
    located = np.array(rows, np.int64).reshape(-1, 3, 2)
    located[..., 0] //= tarfile.BLOCKSIZE
    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    measured = np.array(sizes, np.int32).reshape(-1, 2)
    table = tabulate_records(records, columns)
    return ShardScan(encoded, located.astype(np.uint32), skipped, captions, sparse, measured, table)


class RemoteFile(AbstractBufferedFile):
    """A shard on its server as a file that is read in blocks; raises like `read_range`."""

    def __init__(self, remote: RemoteShard) -> None:
        super().__init__(None, str(remote), size=remote.size, block_size=2**16)
        self._remote = remote

    def _fetch_range(self, start: int, end: int) -> bytes:
        return read_range(self._remote, start, end)


def split_member_name(name: str) -> tuple[str, str] | None:
    """Returns a member's key and its suffix in lower case; None for a name without one of them."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem and dot else None


def _choose_places(group: list[TarMember]) -> dict[str, int]:
    has_picture = any(_PLACE.get(member.suffix) == 0 for member in group)
    return _PLACE if has_picture else _CACHED_PLACE


def _locate_members(
    group: list[TarMember], places: dict[str, int]
) -> tuple[list[tuple[int, int]], str | None]:
    """Returns the members of one sample by column, and the reason if it is unusable."""
    row = [(0, 0)] * 3
    for member in group:
        column = places.get(member.suffix)
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


def _iterate_members(raw: IOBase, name: str) -> Iterator[TarMember]:
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
                if member.isreg() and (parts := split_member_name(member.name)):
                    (key, suffix), text = parts, None
                    if suffix in ("txt", "json") and not is_sparse and size <= MAX_TEXT_BYTES:
                        file.seek(at)
                        text = file.read(size)
                    yield TarMember(key, suffix, at, size, text, is_sparse)
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
    if length - offset > MAX_PADDING:
        raise ShardError(f"{length - offset:,} bytes from the end mark at byte {offset} on")
    while chunk := file.read(MAX_HEADER_BYTES):
        if chunk.count(0) != len(chunk):
            raise ShardError(f"data after the end mark at byte {offset}; are two archives joined?")


def _identify_file(raw: IOBase) -> str | None:
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
