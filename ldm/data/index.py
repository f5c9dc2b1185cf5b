"""Where each sample lies inside tar shards, learnt from the tar headers alone.

Shapes: N samples, 3 members a sample (image, txt, json), 2 numbers a member (offset, size).
"""

import itertools
import json
import logging
import os
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader, FileIO
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ldm.data.images import MAX_BYTES as MAX_IMAGE
from ldm.files import replacing

MAX_TEXT = 2**20
MAX_HEADER = 2**20
INDEX_NAME = "index.npz"

_MEMBERS = ("image", "txt", "json")
_COLUMN = {"jpg": 0, "jpeg": 0, "png": 0, "webp": 0, "txt": 1, "json": 2}
_LIMITS = (MAX_IMAGE, MAX_TEXT, MAX_TEXT)
_END = bytes(2 * tarfile.BLOCKSIZE)
_VERSION = 1
_log = logging.getLogger(__name__)

Group = list[tuple[str, int, int]]  # suffix, offset, size of each member of one key


class ShardError(ValueError):
    """A shard that is no intact tar archive, or shards without a single usable sample."""


@dataclass(frozen=True)
class Index:
    """The samples of a list of shards, in shard order.

    paths: the S shards; stamps: (size in bytes, mtime in ns) of each when it was scanned.
    shard (N,): number of the sample's shard.
    members (N, 3, 2): (offset, size) of image, txt and json in bytes; (0, 0) where absent.
    key_bytes, key_ends (N,): all keys in UTF-8 one after another, and where each ends.
    skipped: how many samples were left out, by reason.
    """

    paths: list[Path]
    stamps: list[list[int]]
    shard: np.ndarray
    members: np.ndarray
    key_bytes: np.ndarray
    key_ends: np.ndarray
    skipped: dict[str, int]

    def __len__(self) -> int:
        return len(self.shard)

    def key(self, i: int) -> str:
        """The key of sample i: its member names up to the first dot."""
        start = self.key_ends[i - 1] if i > 0 else 0
        return self.key_bytes[start : self.key_ends[i]].tobytes().decode("utf-8", "replace")

    def shard_sizes(self) -> list[int]:
        """The number of samples in each of the S shards."""
        return np.bincount(self.shard, minlength=len(self.paths)).tolist()


def open_index(source: str | Path | Sequence[str | Path]) -> Index:
    """The index of a folder's .tar files, of one .tar file, or of a list of both.

    What a list names twice has twice the weight.

    A folder's index is kept in `index.npz` beside the shards and made anew when a shard was added,
    removed or changed; where it cannot be written it lives in memory only, as a list's does.
    Raises FileNotFoundError where there is no shard, ShardError where one is damaged or where no
    sample has both image and caption.
    """
    paths = _shard_paths(source)
    stamps = [[stat.st_size, stat.st_mtime_ns] for stat in map(os.stat, paths)]
    cache = Path(source) / INDEX_NAME if _is_folder(source) else None
    index = _load(cache, paths, stamps) if cache else None
    if index is None:
        index = _build(paths, stamps)
        if cache:
            _save(index, cache)
    if index.skipped:
        _log.warning("%s: samples left out: %s", paths[0].parent, index.skipped)
    if len(index) == 0:
        raise ShardError(
            f"{paths[0].parent}: no sample has both image and caption (left out: {index.skipped}); "
            "the members of a sample share their name up to the first dot and follow one another"
        )
    return index


def scan_shard(path: Path) -> tuple[list[str], list[list[tuple[int, int]]], Counter[str]]:
    """Keys and members (offset, size) x (image, txt, json) of a shard, and what was left out.

    Grouped as webdataset does: neighbours with the same name up to the first dot of the base name.
    Links and devices are no members. Raises ShardError where the archive is damaged.
    """
    keys, rows, skipped = {}, [], Counter()
    for key, group in itertools.groupby(_members(path), key=lambda member: member[0]):
        row, reason = _place([member[1:] for member in group])
        if not reason and key in keys:
            reason = "key seen before in its shard"
        if reason:
            skipped[reason] += 1
        else:
            keys[key] = None
            rows.append(row)
    return list(keys), rows, skipped


def _is_folder(source: str | Path | Sequence[str | Path]) -> bool:
    return isinstance(source, (str, Path)) and Path(source).is_dir()


def _shard_paths(source: str | Path | Sequence[str | Path]) -> list[Path]:
    sources = [source] if isinstance(source, (str, Path)) else source
    paths = []
    for path in map(Path, sources):
        paths += sorted(path.glob("*.tar")) if path.is_dir() else [path]
    if not paths:
        raise FileNotFoundError(f"no .tar shards in {source}; `python -m ldm.prepare` writes them")
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(
                f"no shards at {path}: `python -m ldm.prepare` writes them there (out={path})"
            )
    return paths


def _build(paths: list[Path], stamps: list[list[int]]) -> Index:
    shard, members, keys, skipped = [], [], [], Counter()
    for number, path in enumerate(tqdm(paths, desc="indexing shards", unit="shard", delay=2)):
        shard_keys, rows, shard_skipped = scan_shard(path)
        keys.extend(key.encode("utf-8", "surrogateescape") for key in shard_keys)
        members.append(np.array(rows, np.int64).reshape(-1, 3, 2))
        shard.append(np.full(len(rows), number, np.int32))
        skipped += shard_skipped
    return Index(
        paths=paths,
        stamps=stamps,
        shard=np.concatenate(shard),
        members=np.concatenate(members),
        key_bytes=np.frombuffer(b"".join(keys), np.uint8),
        key_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
        skipped=dict(skipped),
    )


def _save(index: Index, cache: Path) -> None:
    meta = {
        "version": _VERSION,
        "shards": [path.name for path in index.paths],
        "stamps": index.stamps,
        "skipped": index.skipped,
    }
    try:
        with replacing(cache) as file:
            np.savez(
                file,
                meta=np.array(json.dumps(meta)),
                shard=index.shard,
                members=index.members,
                key_bytes=index.key_bytes,
                key_ends=index.key_ends,
            )
    except OSError as error:
        _log.info("%s: index kept in memory only: %s", cache, error)


def _load(cache: Path, paths: list[Path], stamps: list[list[int]]) -> Index | None:
    """The saved index where it is readable and speaks of exactly these shards."""
    try:
        with np.load(cache, allow_pickle=False) as arrays:
            meta = json.loads(str(arrays["meta"]))
            current = [_VERSION, [path.name for path in paths], stamps]
            if [meta["version"], meta["shards"], meta["stamps"]] != current:
                return None
            rest = {name: arrays[name] for name in ("shard", "members", "key_bytes", "key_ends")}
            return Index(paths=paths, stamps=stamps, skipped=meta["skipped"], **rest)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def _place(group: Group) -> tuple[list[tuple[int, int]], str | None]:
    """The members of one sample by column, and the reason where it cannot be used."""
    row = [(0, 0)] * 3
    for suffix, offset, size in group:
        column = _COLUMN.get(suffix)
        if column is None:
            continue
        if row[column] != (0, 0):
            return row, f"more than one {_MEMBERS[column]}"
        if size > _LIMITS[column]:
            return row, f"{_MEMBERS[column]} over {_LIMITS[column] >> 20} MB"
        row[column] = (offset, size)
    image, txt, record = row
    if image == (0, 0):
        return row, "no image"
    return row, "no caption" if txt == record == (0, 0) else None


def _members(path: Path) -> Iterator[tuple[str, str, int, int]]:
    """(key, suffix, offset, size) of the regular files of an archive that is whole."""
    try:
        with (
            _HeaderReader(FileIO(path)) as file,
            tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape") as tar,
        ):
            length = os.fstat(file.fileno()).st_size
            for member in _walk(tar):
                if not 0 <= member.size <= length - member.offset_data:
                    raise ShardError(f"member '{member.name}' ends outside the file")
                folder, slash, base = member.name.rpartition("/")
                stem, dot, suffix = base.partition(".")
                if stem and dot and member.isreg():
                    yield folder + slash + stem, suffix.lower(), member.offset_data, member.size
            _check_end(file, tar.offset)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise ShardError(
            f"{path} is no intact tar archive ({_what(path) or error}); "
            "fetch or write it again, or move it out of the folder"
        ) from error


def _walk(tar: tarfile.TarFile) -> Iterable[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members.clear()  # a million headers need not stay in memory
        yield member


def _check_end(file: BufferedReader, offset: int) -> None:
    """tarfile stops without a word at whatever is no header: see that it is the true end."""
    file.seek(offset)
    if file.read(len(_END)) != _END:
        raise ShardError(f"no end mark after the last member, at byte {offset}")
    while chunk := file.read(MAX_HEADER):
        if chunk.count(0) != len(chunk):
            raise ShardError(f"data after the end mark at byte {offset}; are two archives joined?")


def _what(path: Path) -> str | None:
    """What a file that is no tar archive plainly is instead."""
    with open(path, "rb") as file:
        head = file.read(2)
    if head == b"\x1f\x8b":
        return "it is gzip-compressed: unpack it with gunzip, shards are read at offsets"
    return None if head else "it is empty"


class _HeaderReader(BufferedReader):
    """A file for tarfile that refuses a header which claims to be gigabytes long."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        return super().read(size)
