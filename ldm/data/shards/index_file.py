"""The index of tar shards, and the npz file that it is saved in.

Shapes: N samples, S shards, 3 members a sample (image, txt, json), 2 numbers a member.
"""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Any

import numpy as np

from ldm.data.captions import CaptionCount
from ldm.data.shards.remote import RemoteShard
from ldm.utils.files import replace_file
from ldm.utils.hashing import hash_bytes

INDEX_NAME = "index.npz"

_ARRAYS = ("shard", "members", "key_bytes", "key_ends")
_VERSION = 3
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardIndex:
    """The samples of a list of shards, in shard order.

    stamps: of each shard when it was scanned: size in bytes, and mtime in ns or the server's ETag.
    shard (N,) int32: number of the sample's shard.
    members (N, 3, 2) uint32: offset in blocks of 512 bytes and size in bytes; (0, 0) if absent.
    key_bytes, key_ends (N,): all keys in UTF-8 one after another, and where each ends.
    skipped: how many samples were left out, by reason; sparse: the first sparse member of each
    shard that has one; captions: counts over all usable samples.
    sizes (N, 2) int32: width and height of each upright image in pixels, (0, 0) if its header
    cannot be read; None, or (-1, -1), if not measured yet. caption_weights: see `ReadOptions`.
    columns (N,): float64 or str, the values of keys of the json, see `json_columns`.
    data_sets: the number of shards of each of several data sets, one after another.
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
    sizes: np.ndarray | None = None
    caption_weights: dict[str, float] = field(default_factory=dict)
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    data_sets: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.shard)

    def key(self, i: int, *, errors: str = "replace") -> str:
        """Returns the key of sample i; errors: "surrogateescape" keeps bytes that are no UTF-8."""
        start = self.key_ends[i - 1] if i > 0 else 0
        return self.key_bytes[start : self.key_ends[i]].tobytes().decode("utf-8", errors)

    def locations(self, i: int) -> list[tuple[int, int]]:
        """Returns (offset, size) in bytes of sample i's image, txt and json; (0, 0) if absent."""
        return [(block * BLOCKSIZE, size) for block, size in self.members[i].tolist()]

    def set_sizes(self) -> list[int]:
        """Returns the number of samples in each of several data sets."""
        ends = np.searchsorted(self.shard, np.cumsum(self.data_sets))
        return np.diff(ends, prepend=0).tolist()

    def shard_sizes(self) -> list[int]:
        """Returns the number of samples in each of the S shards."""
        return np.bincount(self.shard, minlength=len(self.paths)).tolist()

    @cached_property
    def fingerprint(self) -> str:
        """A digest of keys, order, sizes and caption keys, wherever the shards are stored."""
        keys = "".join(self.caption_weights)
        if len(self.caption_weights) > 1:
            keys = json.dumps(self.caption_weights, sort_keys=True)
        return hash_bytes(
            self.key_bytes.tobytes(),
            keys.encode("utf-8", "replace"),
            self.key_ends.astype("<i8").tobytes(),
            self.members[:, :, 1].astype("<u4").tobytes(),
        )[:16]

    @property
    def keys_digest(self) -> str:
        """A digest of keys and order alone."""
        return hash_bytes(self.key_bytes.tobytes(), self.key_ends.astype("<i8").tobytes())[:16]

    def select(self, keep: np.ndarray, *, skipped: dict[str, int]) -> "ShardIndex":
        """Returns the samples for which keep (N,) bool is true; `skipped` counts the others."""
        lengths = np.diff(self.key_ends, prepend=0)
        return replace(
            self,
            shard=self.shard[keep],
            members=self.members[keep],
            key_bytes=self.key_bytes[np.repeat(keep, lengths)],
            key_ends=np.cumsum(lengths[keep]),
            sizes=None if self.sizes is None else self.sizes[keep],
            columns={key: values[keep] for key, values in self.columns.items()},
            skipped={**self.skipped, **skipped},
        )


def join_indexes(indexes: Sequence[ShardIndex]) -> ShardIndex:
    """Returns the samples of several data sets one after another."""
    first_shards = np.cumsum([0, *(len(index.paths) for index in indexes)])
    first_bytes = np.cumsum([0, *(len(index.key_bytes) for index in indexes)])
    skipped, captions = Counter(), CaptionCount()
    for index in indexes:
        skipped.update(index.skipped)
        captions.update(index.captions)
    sizes = [index.sizes for index in indexes]
    return replace(
        indexes[0],
        paths=[path for index in indexes for path in index.paths],
        stamps=[stamp for index in indexes for stamp in index.stamps],
        shard=np.concatenate(
            [index.shard + first for index, first in zip(indexes, first_shards, strict=False)],
            dtype=np.int32,
        ),
        members=np.concatenate([index.members for index in indexes]),
        key_bytes=np.concatenate([index.key_bytes for index in indexes]),
        key_ends=np.concatenate(
            [index.key_ends + first for index, first in zip(indexes, first_bytes, strict=False)]
        ),
        skipped=dict(skipped),
        captions=captions,
        sparse=[name for index in indexes for name in index.sparse],
        sizes=None if any(one is None for one in sizes) else np.concatenate(sizes),
        columns={},
        data_sets=[len(index.paths) for index in indexes],
    )


def save_index(index: ShardIndex, file: Path) -> None:
    meta = {
        "version": _VERSION,
        "shards": _list_saved_names(index.paths, file),
        "stamps": index.stamps,
        "skipped": index.skipped,
        "captions": asdict(index.captions),
        "sparse": index.sparse,
        "columns": list(index.columns),
    }
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    if index.sizes is not None:
        arrays["sizes"] = index.sizes
    arrays |= {f"column{i}": values for i, values in enumerate(index.columns.values())}
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


def load_index(
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
                sizes=arrays.get("sizes"),
                columns={
                    key: arrays[f"column{i}"] for i, key in enumerate(meta.get("columns", ()))
                },
                **{name: arrays[name] for name in _ARRAYS},
            )
    except Exception as error:  # zipfile and numpy raise many kinds for damaged files
        _log.info("%s is built again: %r", file, error)
        return None


def list_absolute_names(paths: Sequence[Path | RemoteShard]) -> list[str]:
    return [str(path if isinstance(path, RemoteShard) else path.absolute()) for path in paths]


def _list_saved_names(paths: Sequence[Path | RemoteShard], file: Path) -> list[str]:
    """Returns the shards as an index names them: a folder may move with its index."""
    in_folder = file.name == INDEX_NAME
    return [path.name for path in paths] if in_folder else list_absolute_names(paths)
