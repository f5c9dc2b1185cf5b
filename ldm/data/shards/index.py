"""Opens the index of tar shards: loads it, or builds and saves it, and checks what it says."""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ldm.data.captions import CaptionCount
from ldm.data.shards.cache import ShardCache
from ldm.data.shards.data_sets import list_data_sets
from ldm.data.shards.index_file import (
    INDEX_NAME,
    ShardIndex,
    join_indexes,
    list_absolute_names,
    load_index,
    save_index,
)
from ldm.data.shards.json_columns import join_columns
from ldm.data.shards.locations import ShardSource, locate_shards, redact_source
from ldm.data.shards.parallel_scan import measure_images, scan_in_parallel
from ldm.data.shards.remote import RemoteShard
from ldm.data.shards.selection import MEASURED_COLUMNS, select_samples
from ldm.data.shards.tar_headers import SPARSE_MEMBER, UNMEASURED, ShardError
from ldm.data.where import SampleFilter
from ldm.utils.errors import suggest_nearest
from ldm.utils.files import resolve_path
from ldm.utils.hashing import hash_bytes
from ldm.utils.locks import hold_lock

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReadOptions:
    """Which samples of shards to read, and how.

    min_size: leave out images whose short side has fewer pixels; where: read only the samples that
    meet this condition, see `SampleFilter`; measure: the index has the sizes of images; cache:
    holds shards of servers and their index; read_only: do not save an index; caption_key: see
    `read_sample_captions`; captions: the weight of each of several keys, see
    `read_weighted_captions`;
    on_error: "skip" leaves out sparse members, "stop" raises ShardError for them.
    """

    min_size: int | None = None
    where: str | None = None
    measure: bool = False
    cache: ShardCache | None = None
    read_only: bool = False
    caption_key: str | None = None
    captions: Mapping[str, float] | None = None
    on_error: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        if self.min_size is not None and self.min_size < 1:
            raise ValueError(f"min_size must be 1 pixel or more, or null, got {self.min_size}")
        if self.where is not None:
            SampleFilter(self.where)
        if not isinstance(self.caption_key, str | None):
            raise ValueError(f"caption_key is a name or null, got {self.caption_key!r}")
        if self.captions is not None:
            if self.caption_key is not None:
                raise ValueError("caption_key and captions exclude each other: give one of them")
            weights = self.captions.values() if isinstance(self.captions, Mapping) else ()
            if not weights or not all(_is_weight(weight) for weight in weights):
                raise ValueError(
                    "captions has keys of the json with weights above 0, such as "
                    f"'{{short: 0.2, long: 0.8}}', got {self.captions}"
                )

    @property
    def needs_sizes(self) -> bool:
        """Whether the index must have the size of each image."""
        return (
            self.measure
            or self.min_size is not None
            or not set(MEASURED_COLUMNS).isdisjoint(self.filter_keys)
        )

    @property
    def filter_keys(self) -> tuple[str, ...]:
        """The columns that `where` reads."""
        return SampleFilter(self.where).keys if self.where is not None else ()

    @property
    def caption_weights(self) -> dict[str, float]:
        """The weight of each key of the json that is read; none: as `read_sample_captions`."""
        key = self.caption_key
        return dict(self.captions or {}) if key is None else {key: 1.0}


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


DEFAULT_READ_OPTIONS = ReadOptions()


def open_index(source: ShardSource, options: ReadOptions = DEFAULT_READ_OPTIONS) -> ShardIndex:
    """Returns the index of a source (see `locate_shards`), without unusable samples.

    It is loaded from `index.npz` in the folder of the shards (or, for other sources, in the cache),
    or built and saved there if shards were added or changed. Data sets (see `list_data_sets`) have
    an index each, and are joined.
    """
    if data_sets := list_data_sets(source):
        return join_indexes([open_index(one.path, options) for one in data_sets])
    paths, name, cache = locate_shards(source), redact_source(source), options.cache
    if cache is None and any(isinstance(path, RemoteShard) for path in paths):
        raise ValueError(f"{name}: shards on servers need data.cache=FOLDER to be stored in")
    index = _load_or_build_index(paths, _find_index_path(source, paths, cache), options, name)
    index = replace(index, caption_weights=options.caption_weights)
    if index.sparse and options.on_error != "skip":
        raise ShardError(
            f"{index.sparse[0]} is a {SPARSE_MEMBER}, as `tar -S` writes files with holes, "
            "and cannot be read: make the tar without -S (--sparse), or leave such samples out "
            f"({index.skipped[SPARSE_MEMBER]}) with data.on_error=skip"
        )
    if options.min_size is not None:
        short = index.sizes.min(axis=1)
        keep = short >= options.min_size
        unread = int((short == 0).sum())
        reasons = {f"short side under {options.min_size} px": int((~keep).sum()) - unread}
        reasons["unreadable header"] = unread
        index = index.select(keep, skipped={reason: n for reason, n in reasons.items() if n})
    if options.where is not None and len(index):
        index = select_samples(index, SampleFilter(options.where), name)
    if index.skipped:
        _log.warning("%s: samples left out: %s", name, index.skipped)
    if len(index) == 0:
        raise ShardError(
            f"{name}: no sample has both image and caption (left out: {index.skipped}); "
            "the members of a sample share their name up to the first dot and follow one another"
        )
    _check_captions(index.captions, options, name)
    return index


def _check_captions(count: CaptionCount, options: ReadOptions, name: str) -> None:
    """Warns about empty or undecodable captions; ShardError if no sample has text under a key."""
    keys = tuple(options.caption_weights)
    for key in keys:
        if not count.keys.get(key) and options.captions is None:
            raise ShardError(f"{name}: data.caption_key={key}: {count.describe(key)}")
        if not count.keys.get(key):
            others = ", ".join(count.list_likely_keys()) or "no key"
            near = suggest_nearest(key, [each for each, number in count.keys.items() if number])
            why = f"no json has text under {key}, but: {others}{near}"
            raise ShardError(f"{name}: data.captions: {why}")
    if options.captions is not None:
        shares = (f"{key} in {count.keys[key] / count.samples:.1%}" for key in keys)
        _log.info("%s: captions: %s of the samples", name, ", ".join(shares))
    if count.count_empty(*keys):
        _log.warning("%s: %s", name, count.describe(*keys))
    if count.garbled and not keys:
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
    names = "\n".join(list_absolute_names(paths))
    cache.folder.mkdir(parents=True, exist_ok=True)
    return cache.folder / f"index-{hash_bytes(names.encode('utf-8', 'surrogateescape'))[:16]}.npz"


def _read_stamp(path: Path | RemoteShard) -> list[Any]:
    if isinstance(path, RemoteShard):
        return [path.size, path.etag]
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _load_or_build_index(
    paths: list[Path | RemoteShard], file: Path | None, options: ReadOptions, name: str
) -> ShardIndex:
    """Loads the index; one process of the machine builds what is missing, others wait for it."""
    stamps = [_read_stamp(path) for path in paths]
    keys = [key for key in options.filter_keys if key not in MEASURED_COLUMNS]

    def is_complete(index: ShardIndex | None) -> bool:
        if index is None or not index.columns.keys() >= set(keys):
            return False
        if not options.needs_sizes:
            return True
        return index.sizes is not None and bool((index.sizes >= 0).all())

    if is_complete(index := load_index(file, paths, stamps)):
        return index
    with ExitStack() as stack:
        if file:
            with suppress(OSError):  # a file system without locks
                stack.enter_context(hold_lock(file.parent))
        if is_complete(index := load_index(file, paths, stamps)):
            return index
        if index is None or not index.columns.keys() >= set(keys):
            names = [*dict.fromkeys([*(index.columns if index else ()), *keys])]
            built, known = _build_index(paths, stamps, options.cache, names)
            if lacking := [key for key in keys if key not in built.columns]:
                known = [*known, *MEASURED_COLUMNS]
                SampleFilter(options.where).refuse_key(lacking[0], known, name)
            index = replace(built, sizes=built.sizes if index is None else index.sizes)
        if options.needs_sizes:
            sizes = (
                np.full((len(index), 2), UNMEASURED, np.int32)
                if index.sizes is None
                else index.sizes
            )
            images = index.members[:, 0]
            sizes = measure_images(paths, index.shard, images, sizes, options.cache)
            index = replace(index, sizes=sizes)
        if file and not options.read_only:
            save_index(index, file)
    return index


def _build_index(
    paths: list[Path | RemoteShard],
    stamps: list[list[Any]],
    cache: ShardCache | None,
    columns: Sequence[str],
) -> tuple[ShardIndex, list[str]]:
    """Scans the shards; returns the index, and the keys of their json if columns are read."""
    keys, lengths, members, sizes, sparse, tables = [], [], [], [], [], []
    skipped, captions = Counter(), CaptionCount()
    for path, scan in zip(paths, scan_in_parallel(paths, cache, columns), strict=True):
        keys.append(b"".join(scan.keys))
        lengths.append(np.array([len(key) for key in scan.keys], np.int64))
        members.append(scan.members)
        sizes.append(scan.sizes)
        tables.append(scan.columns)
        skipped.update(scan.skipped)
        captions.update(scan.captions)
        sparse += [f"{path}: '{scan.sparse}'"] if scan.sparse else []
    sizes, (values, known) = np.concatenate(sizes), join_columns(tables)
    index = ShardIndex(
        paths=paths,
        stamps=stamps,
        sizes=sizes if (sizes >= 0).any() else None,
        shard=np.repeat(np.arange(len(paths), dtype=np.int32), [len(part) for part in members]),
        members=np.concatenate(members),
        key_bytes=np.frombuffer(b"".join(keys), np.uint8),
        key_ends=np.cumsum(np.concatenate(lengths)),
        skipped=dict(skipped),
        captions=captions,
        sparse=sparse,
        columns=values,
    )
    return index, known
