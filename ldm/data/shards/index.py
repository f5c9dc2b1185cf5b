"""Where each sample lies inside tar shards: an index of their headers, and the filters on it.

Shapes: N samples, 3 members a sample (image, txt, json), 2 numbers a member.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ldm.data.captions import CaptionCount
from ldm.data.shards.cache import ShardCache
from ldm.data.shards.locations import ShardSource, locate_shards, redact_source
from ldm.data.shards.parallel_scan import TAR_BLOCK_BYTES, measure_short_sides, scan_in_parallel
from ldm.data.shards.remote import RemoteShard
from ldm.data.shards.tar_headers import SPARSE_MEMBER, ShardError
from ldm.utils.files import replace_file, resolve_path
from ldm.utils.locks import hold_lock

INDEX_NAME = "index.npz"

_ARRAYS = ("shard", "members", "key_bytes", "key_ends")
_VERSION = 3
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardIndex:
    """The samples of a list of shards, in shard order.

    paths: the S shards, local or on servers; stamps: (size in bytes, mtime in ns, or the server's
    mark) of each when it was scanned.
    shard (N,) int32: number of the sample's shard.
    members (N, 3, 2) uint32: (offset in blocks of 512 bytes, size in bytes) of image, txt and json;
    (0, 0) where absent.
    key_bytes, key_ends (N,): all keys in UTF-8 one after another, and where each ends.
    skipped: how many samples were left out, by reason; sparse: of each shard that has any, its name
    and that of its first sparse member.
    captions: what the texts of all usable samples hold; caption_key: see `sample_captions`.
    short (N,) int32: short side of each picture in pixels, 0 where its header cannot be read; None
    where nobody has asked for it yet.
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
        """The key of sample i: its member names up to the first dot."""
        start = self.key_ends[i - 1] if i > 0 else 0
        return self.key_bytes[start : self.key_ends[i]].tobytes().decode("utf-8", "replace")

    def places(self, i: int) -> list[tuple[int, int]]:
        """(offset, size) in bytes of sample i's image, txt and json; (0, 0) where absent."""
        return [(block * TAR_BLOCK_BYTES, size) for block, size in self.members[i].tolist()]

    def shard_sizes(self) -> list[int]:
        """The number of samples in each of the S shards."""
        return np.bincount(self.shard, minlength=len(self.paths)).tolist()

    @property
    def fingerprint(self) -> str:
        """Of the samples' keys, order and sizes in bytes, and of what is read as their captions.

        Wherever their shards lie.
        """
        digest = hashlib.sha256(self.key_bytes.tobytes())
        if self.caption_key is not None:
            digest.update(self.caption_key.encode("utf-8", "replace"))
        digest.update(self.key_ends.astype("<i8").tobytes())
        digest.update(self.members[:, :, 1].astype("<u4").tobytes())
        return digest.hexdigest()[:16]

    def where(self, keep: np.ndarray, *, skipped: dict[str, int]) -> "ShardIndex":
        """Only the samples for which keep (N,) bool is true; `skipped` says why not the others."""
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


def open_index(
    source: ShardSource,
    *,
    min_size: int | None = None,
    cache: ShardCache | None = None,
    read_only: bool = False,
    caption_key: str | None = None,
    on_error: Literal["stop", "skip"] = "stop",
) -> ShardIndex:
    """The index of what `locate` finds: of a folder's .tar files, of one file, URL or list.

    What a list names twice has twice the weight. Samples without a caption member are left out;
    with `min_size` also pictures whose short side has fewer pixels or whose header cannot be read;
    with on_error="skip" those with a sparse member, which has no bytes to be read at an offset.
    Empty captions are counted, and told.

    A folder's index is kept in `index.npz` beside the shards, any other's in the `cache`, and made
    anew when a shard was added, removed or changed; without a place for it, or where it is
    `read_only`, a new one lives in memory.
    Raises FileNotFoundError where there is no shard, ShardError where one is damaged or has sparse
    members, where no sample is left or none has text under `caption_key`, ValueError where a URL
    has no cache, and what `locate` raises.
    """
    if min_size is not None and min_size < 1:
        raise ValueError(f"min_size must be 1 pixel or more, or null, got {min_size}")
    if not isinstance(caption_key, str | None):
        raise ValueError(f"caption_key is a name or null, got {caption_key!r}")
    paths = locate_shards(source)
    if cache is None and any(isinstance(path, RemoteShard) for path in paths):
        raise ValueError(
            f"{redact_source(source)}: shards on servers need data.cache=FOLDER to be kept in"
        )
    home, measured = _find_index_path(source, paths, cache), min_size is not None
    index = _load_or_build_index(paths, home, cache, measured=measured, read_only=read_only)
    index = replace(index, caption_key=caption_key)
    if index.sparse and on_error != "skip":
        raise ShardError(
            f"{index.sparse[0]} is a {SPARSE_MEMBER}, as `tar -S` writes files with holes, "
            "and cannot "
            "be read: make the tar without -S (--sparse), or leave such samples out "
            f"({index.skipped[SPARSE_MEMBER]}) with data.on_error=skip"
        )
    if min_size is not None:
        keep = index.short >= min_size
        unread = int((index.short == 0).sum())
        reasons = {f"short side under {min_size} px": int((~keep).sum()) - unread}
        reasons["unreadable header"] = unread
        index = index.where(keep, skipped={why: n for why, n in reasons.items() if n})
    if index.skipped:
        _log.warning("%s: samples left out: %s", redact_source(source), index.skipped)
    if len(index) == 0:
        raise ShardError(
            f"{redact_source(source)}: no sample has both image and caption (left out: "
            f"{index.skipped}); "
            "the members of a sample share their name up to the first dot and follow one another"
        )
    _warn_about_captions(index, redact_source(source))
    return index


def _warn_about_captions(index: ShardIndex, name: str) -> None:
    """Warn of captions that are empty or no text; ShardError where a key was named in vain."""
    count, key = index.captions, index.caption_key
    if key is not None and count.without(key) == count.samples:
        raise ShardError(f"{name}: data.caption_key={key}: {count.describe(key)}")
    if count.without(key):
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
    """Where the index is kept."""
    if isinstance(source, (str, Path)) and (folder := resolve_path(source)).is_dir():
        return folder / INDEX_NAME
    if cache is None:
        return None
    digest = hashlib.sha256("\n".join(_list_shard_names(paths)).encode("utf-8", "surrogateescape"))
    cache.folder.mkdir(parents=True, exist_ok=True)
    return cache.folder / f"index-{digest.hexdigest()[:16]}.npz"


def _list_shard_names(paths: Sequence[Path | RemoteShard]) -> list[str]:
    return [str(path if isinstance(path, RemoteShard) else path.absolute()) for path in paths]


def _load_or_build_index(
    paths: list[Path | RemoteShard],
    home: Path | None,
    cache: ShardCache | None,
    *,
    measured: bool,
    read_only: bool,
) -> ShardIndex:
    stamps = [_read_stamp(path) for path in paths]
    if (
        home
        and (index := _load_index(home, paths, stamps))
        and (not measured or index.short is not None)
    ):
        return index
    with _lock_index(home):
        index = _load_index(home, paths, stamps) if home else None
        if index is None:
            index = _build_index(paths, stamps, cache)
        elif not measured or index.short is not None:
            return index
        if measured:
            index = replace(
                index, short=measure_short_sides(index.paths, index.shard, index.members, cache)
            )
        if home and not read_only:
            _save_index(index, home)
    return index


@contextmanager
def _lock_index(home: Path | None) -> Iterator[None]:
    """One process of the machine makes an index, the others wait for it and load it."""
    with ExitStack() as stack:
        if home:
            with suppress(OSError):  # a file system without locks
                stack.enter_context(hold_lock(home.parent))
        yield


def _read_stamp(path: Path | RemoteShard) -> list[Any]:
    if isinstance(path, RemoteShard):
        return [path.size, path.etag]
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _build_index(
    paths: list[Path | RemoteShard], stamps: list[list[Any]], cache: ShardCache | None
) -> ShardIndex:
    shard, members, keys, lengths, skipped = [], [], [], [], Counter()
    captions, sparse = CaptionCount(), []
    for number, scanned in enumerate(scan_in_parallel(paths, cache)):
        keys.append(scanned.key_bytes)
        lengths.append(scanned.key_lengths)
        members.append(scanned.members)
        shard.append(np.full(len(scanned.members), number, np.int32))
        skipped.update(scanned.skipped)
        captions.update(scanned.captions)
        sparse += [f"{paths[number]}: '{scanned.sparse}'"] if scanned.sparse else []
    return ShardIndex(
        paths=paths,
        stamps=stamps,
        shard=np.concatenate(shard),
        members=np.concatenate(members),
        key_bytes=np.frombuffer(b"".join(keys), np.uint8),
        key_ends=np.cumsum(np.concatenate(lengths), dtype=np.int64),
        skipped=dict(skipped),
        captions=captions,
        sparse=sparse,
    )


def _save_index(index: ShardIndex, home: Path) -> None:
    meta = {
        "version": _VERSION,
        "shards": _meta_names(index.paths, home),
        "stamps": index.stamps,
        "skipped": index.skipped,
        "captions": asdict(index.captions),
        "sparse": index.sparse,
    }
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    if index.short is not None:
        arrays["short"] = index.short
    if _is_foreign(home):
        _log.warning("%s is no index of ours, and stays: the new one is kept in memory only", home)
        return
    try:
        with replace_file(home) as file:
            np.savez(file, meta=np.array(json.dumps(meta)), **arrays)
    except OSError as error:
        _log.info("%s: index kept in memory only: %s", home, error)


def _is_foreign(home: Path) -> bool:
    """Whether a file of this name holds somebody else's arrays; one that is damaged does not."""
    with suppress(Exception), np.load(home, allow_pickle=False) as arrays:  # as in `_load`
        return "meta" not in arrays.files
    return False


def _meta_names(paths: list[Path | RemoteShard], home: Path) -> list[str]:
    """A folder may move with its index, so its shards go by their names there."""
    beside = home.name == INDEX_NAME
    return [path.name for path in paths] if beside else _list_shard_names(paths)


def _load_index(
    home: Path, paths: list[Path | RemoteShard], stamps: list[list[Any]]
) -> ShardIndex | None:
    """The saved index where it is whole and speaks of exactly these shards; it is made in minutes.

    numpy reads as much of an array as its header says, so that its checksum may go unread.
    """
    if not home.is_file():
        return None
    try:
        with np.load(home, allow_pickle=False) as arrays:
            if arrays.zip.testzip() is not None:
                return None
            meta = json.loads(str(arrays["meta"]))
            current = [_VERSION, _meta_names(paths, home), stamps]
            if [meta["version"], meta["shards"], meta["stamps"]] != current:
                return None
            rest = {name: arrays[name] for name in _ARRAYS}
            rest["short"] = arrays.get("short")
            rest["captions"] = CaptionCount(**meta["captions"])
            told = {"skipped": meta["skipped"], "sparse": meta["sparse"]}
            return ShardIndex(paths=paths, stamps=stamps, **told, **rest)
    except Exception as error:  # zipfile and numpy have many ways to say that a file is damaged
        _log.info("%s is made anew: %r", home, error)
        return None
