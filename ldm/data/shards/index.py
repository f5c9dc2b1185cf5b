"""The index of tar shards: where each sample lies, saved next to the shards or in the cache.

Shapes: N samples, S shards, 3 members a sample (image, txt, json), 2 numbers a member.
"""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Any, Literal

import numpy as np

from ldm.data.captions import CaptionCount
from ldm.data.shards.cache import ShardCache
from ldm.data.shards.locations import ShardSource, locate_shards, redact_source
from ldm.data.shards.parallel_scan import measure_short_sides, scan_in_parallel
from ldm.data.shards.remote import RemoteShard
from ldm.data.shards.tar_headers import SPARSE_MEMBER, ShardError
from ldm.utils.files import replace_file, resolve_path
from ldm.utils.hashing import hash_bytes
from ldm.utils.locks import hold_lock

INDEX_NAME = "index.npz"

_ARRAYS = ("shard", "members", "key_bytes", "key_ends")
_VERSION = 3
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReadOptions:
    """Which samples of shards to read, and how.

    min_size: leave out images whose short side has fewer pixels; cache: holds shards of servers and
    their index; read_only: do not save an index; caption_key: see `read_sample_captions`;
    on_error: "skip" leaves out sparse members, "stop" raises ShardError for them.
    """

    min_size: int | None = None
    cache: ShardCache | None = None
    read_only: bool = False
    caption_key: str | None = None
    on_error: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        if self.min_size is not None and self.min_size < 1:
            raise ValueError(f"min_size must be 1 pixel or more, or null, got {self.min_size}")
        if not isinstance(self.caption_key, str | None):
            raise ValueError(f"caption_key is a name or null, got {self.caption_key!r}")


DEFAULT_READ_OPTIONS = ReadOptions()


@dataclass(frozen=True)
class ShardIndex:
    """The samples of a list of shards, in shard order.

    stamps: of each shard when it was scanned: size in bytes, and mtime in ns or the server's ETag.
    shard (N,) int32: number of the sample's shard.
    members (N, 3, 2) uint32: offset in blocks of 512 bytes and size in bytes; (0, 0) if absent.
    key_bytes, key_ends (N,): all keys in UTF-8 one after another, and where each ends.
    skipped: how many samples were left out, by reason; sparse: the first sparse member of each
    shard that has one; captions: counts over all usable samples.
    short (N,) int32: short side of each image in pixels, 0 if its header cannot be read; None if
    not measured yet.
    """

    paths: list[Path | RemoteShard]
    stamps: list[list[Any]]
    shard: np.ndarray
    members: np.ndarray
    key_bytes: np.ndarray
    key_ends: np.ndarray
    skipped: dict[str, int]
    captions: CaptionCount
    sparse: list[str]
    short: np.ndarray | None = None
    caption_key: str | None = None

    def __len__(self) -> int:
        return len(self.shard)

    def key(self, i: int) -> str:
        start = self.key_ends[i - 1] if i > 0 else 0
        return self.key_bytes[start : self.key_ends[i]].tobytes().decode("utf-8", "replace")

    def locations(self, i: int) -> list[tuple[int, int]]:
        """Returns (offset, size) in bytes of sample i's image, txt and json; (0, 0) if absent."""
        return [(block * BLOCKSIZE, size) for block, size in self.members[i].tolist()]

    def shard_sizes(self) -> list[int]:
        """Returns the number of samples in each of the S shards."""
        return np.bincount(self.shard, minlength=len(self.paths)).tolist()

    @property
    def fingerprint(self) -> str:
        """A digest of keys, order, sizes and caption key, wherever the shards are stored."""
        return hash_bytes(
            self.key_bytes.tobytes(),
            (self.caption_key or "").encode("utf-8", "replace"),
            self.key_ends.astype("<i8").tobytes(),
            self.members[:, :, 1].astype("<u4").tobytes(),
        )[:16]

    def select(self, keep: np.ndarray, *, skipped: dict[str, int]) -> "ShardIndex":
        """Returns the samples for which keep (N,) bool is true; `skipped` counts the others."""
        lengths = np.diff(self.key_ends, prepend=0)
        return replace(
            self,
            shard=self.shard[keep],
            members=self.members[keep],
            key_bytes=self.key_bytes[np.repeat(keep, lengths)],
            key_ends=np.cumsum(lengths[keep]),
            short=None if self.short is None else self.short[keep],
            skipped={**self.skipped, **skipped},
        )


def open_index(source: ShardSource, options: ReadOptions = DEFAULT_READ_OPTIONS) -> ShardIndex:
    """Returns the index of a source (see `locate_shards`), without unusable samples.

    It is loaded from `index.npz` in the folder of the shards (or, for other sources, in the cache),
    or built and saved there if shards were added or changed.
    """
    paths, name, cache = locate_shards(source), redact_source(source), options.cache
    if cache is None and any(isinstance(path, RemoteShard) for path in paths):
        raise ValueError(f"{name}: shards on servers need data.cache=FOLDER to be stored in")
    index = _load_or_build_index(paths, _find_index_path(source, paths, cache), options)
    index = replace(index, caption_key=options.caption_key)
    if index.sparse and options.on_error != "skip":
        raise ShardError(
            f"{index.sparse[0]} is a {SPARSE_MEMBER}, as `tar -S` writes files with holes, "
            "and cannot be read: make the tar without -S (--sparse), or leave such samples out "
            f"({index.skipped[SPARSE_MEMBER]}) with data.on_error=skip"
        )
    if options.min_size is not None:
        keep = index.short >= options.min_size
        unread = int((index.short == 0).sum())
        reasons = {f"short side under {options.min_size} px": int((~keep).sum()) - unread}
        reasons["unreadable header"] = unread
        index = index.select(keep, skipped={reason: n for reason, n in reasons.items() if n})
    if index.skipped:
        _log.warning("%s: samples left out: %s", name, index.skipped)
    if len(index) == 0:
        raise ShardError(
            f"{name}: no sample has both image and caption (left out: {index.skipped}); "
            "the members of a sample share their name up to the first dot and follow one another"
        )
    _check_captions(index.captions, options.caption_key, name)
    return index


def _check_captions(count: CaptionCount, key: str | None, name: str) -> None:
    """Warns about empty or undecodable captions; ShardError if no sample has text under `key`."""
    empty = count.count_empty(key)
    if key is not None and empty == count.samples:
        raise ShardError(f"{name}: data.caption_key={key}: {count.describe(key)}")
    if empty:
        _log.warning("%s: %s", name, count.describe(key))
    if count.garbled and key is None:
        _log.warning(
            "%s: %d of %d samples have captions with U+FFFD, which stands for bytes that are no "
            "UTF-8: save the texts in UTF-8",
            name,
            count.garbled,
            count.samples,
        )


def _find_index_path(
    source: ShardSource, paths: list[Path | RemoteShard], cache: ShardCache | None
) -> Path | None:
    if isinstance(source, (str, Path)) and (folder := resolve_path(source)).is_dir():
        return folder / INDEX_NAME
    if cache is None:
        return None
    names = "\n".join(_list_absolute_names(paths))
    cache.folder.mkdir(parents=True, exist_ok=True)
    return cache.folder / f"index-{hash_bytes(names.encode('utf-8', 'surrogateescape'))[:16]}.npz"


def _list_absolute_names(paths: Sequence[Path | RemoteShard]) -> list[str]:
    return [str(path if isinstance(path, RemoteShard) else path.absolute()) for path in paths]


def _list_saved_names(paths: Sequence[Path | RemoteShard], file: Path) -> list[str]:
    """Returns the shards as an index names them: a folder may move with its index."""
    in_folder = file.name == INDEX_NAME
    return [path.name for path in paths] if in_folder else _list_absolute_names(paths)


def _read_stamp(path: Path | RemoteShard) -> list[Any]:
    if isinstance(path, RemoteShard):
        return [path.size, path.etag]
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _load_or_build_index(
    paths: list[Path | RemoteShard], file: Path | None, options: ReadOptions
) -> ShardIndex:
    """Loads the index; one process of the machine builds what is missing, others wait for it."""
    stamps = [_read_stamp(path) for path in paths]

    def is_complete(index: ShardIndex | None) -> bool:
        return index is not None and (options.min_size is None or index.short is not None)

    if is_complete(index := _load_index(file, paths, stamps)):
        return index
    with ExitStack() as stack:
        if file:
            with suppress(OSError):  # a file system without locks
                stack.enter_context(hold_lock(file.parent))
        if is_complete(index := _load_index(file, paths, stamps)):
            return index
        if index is None:
            index = _build_index(paths, stamps, options.cache)
        if options.min_size is not None:
            sides = measure_short_sides(paths, index.shard, index.members, options.cache)
            index = replace(index, short=sides)
        if file and not options.read_only:
            _save_index(index, file)
    return index


def _build_index(
    paths: list[Path | RemoteShard], stamps: list[list[Any]], cache: ShardCache | None
) -> ShardIndex:
    keys, lengths, members, sparse = [], [], [], []
    skipped, captions = Counter(), CaptionCount()
    for path, scan in zip(paths, scan_in_parallel(paths, cache), strict=True):
        keys.append(b"".join(scan.keys))
        lengths.append(np.array([len(key) for key in scan.keys], np.int64))
        members.append(scan.members)
        skipped.update(scan.skipped)
        captions.update(scan.captions)
        sparse += [f"{path}: '{scan.sparse}'"] if scan.sparse else []
    return ShardIndex(
        paths=paths,
        stamps=stamps,
        shard=np.repeat(np.arange(len(paths), dtype=np.int32), [len(part) for part in members]),
        members=np.concatenate(members),
        key_bytes=np.frombuffer(b"".join(keys), np.uint8),
        key_ends=np.cumsum(np.concatenate(lengths)),
        skipped=dict(skipped),
        captions=captions,
        sparse=sparse,
    )


def _save_index(index: ShardIndex, file: Path) -> None:
    meta = {
        "version": _VERSION,
        "shards": _list_saved_names(index.paths, file),
        "stamps": index.stamps,
        "skipped": index.skipped,
        "captions": asdict(index.captions),
        "sparse": index.sparse,
    }
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    if index.short is not None:
        arrays["short"] = index.short
    # Errors mean a damaged file, which may be replaced.
    with suppress(Exception), np.load(file, allow_pickle=False) as before:
        if "meta" not in before.files:
            _log.warning("%s is no index of ldm and stays: the new one is in memory only", file)
            return
    try:
        with replace_file(file) as npz:
            np.savez(npz, meta=np.array(json.dumps(meta)), **arrays)
    except OSError as error:
        _log.info("%s: index in memory only: %s", file, error)


def _load_index(
    file: Path | None, paths: list[Path | RemoteShard], stamps: list[list[Any]]
) -> ShardIndex | None:
    """Returns the saved index if it is whole and of exactly these shards."""
    if file is None or not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if arrays.zip.testzip() is not None:  # numpy does not check the checksums itself
                return None
            meta = json.loads(str(arrays["meta"]))
            current = [_VERSION, _list_saved_names(paths, file), stamps]
            if [meta["version"], meta["shards"], meta["stamps"]] != current:
                return None
            return ShardIndex(
                paths=paths,
                stamps=stamps,
                skipped=meta["skipped"],
                sparse=meta["sparse"],
                captions=CaptionCount(**meta["captions"]),
                short=arrays.get("short"),
                **{name: arrays[name] for name in _ARRAYS},
            )
    except Exception as error:  # zipfile and numpy raise many kinds for damaged files
        _log.info("%s is built again: %r", file, error)
        return None
