"""Writes a cache: shard by shard, by any number of processes, on one machine or several.

    out/cache.json          the manifest; its state says whether all shards are there
    out/null.safetensors    the null condition
    out/NAME.tar            for each shard NAME.tar of the source
    out/NAME_stats.json     counts of that shard and its digest; written last, it makes it count
    out/.claims/NAME        locked by the process that writes the shard

The same source and settings give the same bytes, whoever wrote them, also after kills.
"""

import glob
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from torch import Tensor

from ldm.data.bad_samples import BadSample
from ldm.data.cached.format import pack_tensors
from ldm.data.cached.manifest import (
    MANIFEST_NAME,
    NULL_NAME,
    CacheError,
    Manifest,
    read_manifest,
    write_manifest,
)
from ldm.data.shards.index import ShardIndex, open_index
from ldm.data.shards.reader import write_shard
from ldm.data.shards.remote import RemoteShard
from ldm.utils.files import delete_temporary_files, read_json, replace_file, write_json
from ldm.utils.hashing import hash_file
from ldm.utils.locks import LOCK_HELD_ERRNOS, hold_lock

CLAIMS_FOLDER = ".claims"
POLL_SECONDS = 1.0  # between looks at shards that other processes write
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheShard:
    """One shard to write, of the samples first to end - 1 of the source."""

    folder: Path
    name: str
    first: int
    end: int

    @property
    def tar(self) -> Path:
        return self.folder / f"{self.name}.tar"

    @property
    def stats(self) -> Path:
        return self.folder / f"{self.name}_stats.json"

    def __len__(self) -> int:
        return self.end - self.first

    def read_stats(self, *, verify: bool) -> dict[str, Any] | None:
        """Returns the statistics of a finished shard; None if it must be written.

        verify: compares the digest of its bytes, else their number alone.
        """
        try:
            stats = read_json(self.stats)
            whole = self.tar.stat().st_size == stats["bytes"]
            if whole and verify:
                whole = hash_file(self.tar) == stats["sha256"]
            is_known = isinstance(stats["samples"], int) and isinstance(stats["skipped"], dict)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return stats if whole and is_known else None

    @contextmanager
    def claim(self) -> Iterator[bool]:
        """Yields whether this process may write the shard; no other one may, in the block."""
        path = self.folder / CLAIMS_FOLDER / self.name
        with ExitStack() as stack:
            try:
                stack.enter_context(hold_lock(path, wait=False))
                claimed = True
            except OSError as error:  # of a file system without locks: both write the same bytes
                claimed = error.errno not in LOCK_HELD_ERRNOS
            yield claimed

    def write(self, samples: Iterator[tuple[str, dict[str, bytes]]], skipped: list) -> None:
        """Writes (key, members) samples; `skipped` has the BadSamples when they are exhausted."""
        for path in (self.tar, self.stats):  # of a killed process, for this one has the claim
            delete_temporary_files(self.folder, f"{glob.escape(path.name)}.*")
        self.stats.unlink(missing_ok=True)
        count = write_shard(self.tar, samples)
        stats = {
            "samples": count,
            "skipped": Counter(bad.reason for bad in skipped),
            "damaged": [bad.message for bad in skipped],
            "bytes": self.tar.stat().st_size,
            "sha256": hash_file(self.tar),
        }
        write_json(self.stats, stats)


def plan_cache_shards(folder: Path, index: ShardIndex) -> list[CacheShard]:
    """Returns a shard for each one of the source; CacheError where two have the same name."""
    ends = np.cumsum(index.shard_sizes()).tolist()
    names = [name_cache_shard(path) for path in index.paths]
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise CacheError(
            f"two shards of the source are called {twice[0]}.tar: make a cache of each folder, "
            "and train from the list of them"
        )
    firsts = [0, *ends[:-1]]
    return [CacheShard(folder, *place) for place in zip(names, firsts, ends, strict=True)]


def name_cache_shard(path: Path | RemoteShard) -> str:
    """Returns the name of a shard's file without its suffix."""
    name = os.path.basename(urlsplit(path.url).path) if isinstance(path, RemoteShard) else path.name
    return name.removesuffix(".tar")


def claim_cache_folder(folder: Path, manifest: Manifest, null: dict[str, Tensor]) -> None:
    """Makes `folder` the cache of this manifest; CacheError, with the remedy, if it is another's.

    null: the parts of the null condition.
    """
    (folder / CLAIMS_FOLDER).mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with suppress(OSError):  # a file system without locks
            stack.enter_context(hold_lock(folder / CLAIMS_FOLDER))
        if (folder / MANIFEST_NAME).is_file():
            before = read_manifest(folder, complete=False)
            if differences := before.list_differences(manifest):
                raise CacheError(
                    f"{folder} is a cache with other settings ({'; '.join(differences[:5])}): "
                    "give those again, or another out=..."
                )
            return
        if others := [*folder.glob("*.tar"), *folder.glob(NULL_NAME)]:
            raise CacheError(f"{others[0]} came from elsewhere: use another out=...")
        if null:
            with replace_file(folder / NULL_NAME) as file:
                file.write(pack_tensors(null, stamp=manifest.stamp))
        write_manifest(folder, manifest)


ShardSamples = Callable[[CacheShard, list[BadSample]], Iterator[tuple[str, dict[str, bytes]]]]


def write_cache_shards(
    shards: Sequence[CacheShard],
    make_samples: ShardSamples,
    *,
    start: int = 0,
    on_finished: Callable[[int], object] = lambda count: None,
) -> None:
    """Writes what is missing, until all shards are whole; others may do the same meanwhile.

    make_samples(shard, skipped) yields a shard's samples, and adds to `skipped` what it leaves out.
    start: the first shard that this process tries. on_finished: is called with the source samples
    of each shard that it need not write.
    """
    pending, verify, is_waiting = [*shards[start:], *shards[:start]], True, False
    while pending:
        busy = []
        for shard in pending:
            with shard.claim() as claimed:
                if not claimed:
                    busy.append(shard)
                elif shard.read_stats(verify=verify) is not None:
                    on_finished(len(shard))
                else:
                    skipped: list[BadSample] = []
                    shard.write(make_samples(shard, skipped), skipped)
        if len(busy) == len(pending):
            if not is_waiting:
                _log.warning("waiting for %d shards that other processes write", len(busy))
            is_waiting = True
            time.sleep(POLL_SECONDS)
        pending, verify = busy, False


def complete_manifest(folder: Path, manifest: Manifest, shards: Sequence[CacheShard]) -> Manifest:
    """Writes the manifest of a cache whose shards are all there, and returns it."""
    found = {shard.name: shard.read_stats(verify=False) for shard in shards}
    if missing := [name for name, stats in found.items() if stats is None]:
        raise CacheError(f"{folder}: the shard {missing[0]}.tar has gone: give the command again")
    count = sum(stats["samples"] for stats in found.values())
    skipped = Counter()
    for stats in found.values():
        skipped.update(stats["skipped"])
    whole = replace(
        manifest,
        state="complete",
        samples=count,
        skipped=dict(sorted(skipped.items())),
        shards={name: stats["sha256"] for name, stats in found.items()},
        keys=open_index(folder).keys_digest if count else "",
    )
    write_manifest(folder, whole)
    shutil.rmtree(folder / CLAIMS_FOLDER, ignore_errors=True)
    return whole
