"""A folder of bounded size with whole copies of shards from servers, shared by all processes.

A shard has the suffix `.part` until it is whole. Its readers hold a shared lock on it; when room is
needed, the least recently opened shards that nobody reads are deleted.

    cache/<digest>-<bytes>-<name>    cache/index-<digest>.npz    cache/locks/    cache/.ldm-cache

Only files of such names are deleted, and only in a folder with the marker `.ldm-cache`, which a
folder gets before the first shard if it holds nothing else.
"""

import fcntl
import logging
import os
import re
from contextlib import suppress
from io import FileIO
from pathlib import Path

from ldm.data.shards.remote import RemoteShard, download_shard
from ldm.utils.files import resolve_path, write_text
from ldm.utils.locks import hold_lock

PARTIAL_SUFFIX = ".part"
CACHE_MARKER = ".ldm-cache"
CACHED_SHARD_PATTERN = re.compile(
    rf"[0-9a-f]{{16}}-([0-9]{{1,18}})-[\w.-]{{0,80}}?({re.escape(PARTIAL_SUFFIX)})?"
)
# Other content of a cache: indices, locks, and tables of `ldm.clip` and `ldm.evaluate`.
CACHE_FILE_PATTERN = re.compile(
    rf"index-[0-9a-f]{{16}}\.npz(\..*)?|locks|clip|real|{re.escape(CACHE_MARKER)}.*"
)
_log = logging.getLogger(__name__)


class ShardCache:
    """Whole copies of remote shards in `folder`, at most `gigabytes` of 10^9 bytes."""

    def __init__(self, folder: str | Path, *, gigabytes: float) -> None:
        if not gigabytes > 0:
            raise ValueError(f"cache_gb must be above 0, got {gigabytes}")
        self.folder = resolve_path(folder)
        self.bytes = int(gigabytes * 1e9)
        self._has_warned = False

    def open(self, remote: RemoteShard) -> FileIO:
        """Returns the shard's copy, downloaded if missing; `close` lets it be deleted again."""
        path = self.folder / remote.name
        while True:
            if file := self._open_copy(path, remote.size):
                return file
            self._claim_folder()
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
            with hold_lock(self.folder / "locks" / path.name):
                if path.exists():
                    continue  # another process has downloaded it meanwhile
                part = path.with_name(path.name + PARTIAL_SUFFIX)
                self._make_room(remote, part)
                try:
                    download_shard(remote, part)
                except OSError as error:
                    if error.errno is not None and error.filename is None:
                        raise OSError(error.errno, error.strerror, str(part)) from None
                    raise
                os.replace(part, path)

    @staticmethod
    def close(file: FileIO) -> None:
        fcntl.flock(file.fileno(), fcntl.LOCK_UN)  # see `hold_lock`
        file.close()

    def _open_copy(self, path: Path, size: int) -> FileIO | None:
        try:
            file = FileIO(path)
        except FileNotFoundError:
            return None
        fcntl.flock(file.fileno(), fcntl.LOCK_SH)
        stat = os.fstat(file.fileno())
        if stat.st_nlink == 0:  # it was deleted between open and lock
            self.close(file)
            return None
        if stat.st_size != size:
            self.close(file)
            path.unlink(missing_ok=True)
            _log.warning("%s was damaged; fetching it again", path)
            return None
        os.utime(path)
        return file

    def _claim_folder(self) -> None:
        """Marks the folder as a cache whose shards may be deleted."""
        if (self.folder / CACHE_MARKER).is_file():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in sorted(os.listdir(self.folder)):
            if not (CACHED_SHARD_PATTERN.fullmatch(name) or CACHE_FILE_PATTERN.fullmatch(name)):
                raise ValueError(
                    f"data.cache={self.folder} holds {name!r}, and is no cache: give a new or "
                    "empty folder, out of which shards may be deleted"
                )
        write_text(
            self.folder / CACHE_MARKER, "Shards in this folder are copies, and ldm deletes them\n"
        )

    def _make_room(self, remote: RemoteShard, part: Path) -> None:
        """Deletes others until the shard fits, and creates `part`, whose name reserves the room."""
        if remote.size > self.bytes:
            raise ValueError(
                f"{remote} has {remote.size / 1e9:.2f} GB and does not fit into a cache of "
                f"{self.bytes / 1e9:.2f} GB: raise data.cache_gb"
            )
        with hold_lock(self.folder / "locks" / "room"):
            part.touch()
            shards = self._list_shards()
            total = sum(size for _, size, _ in shards)
            for _, size, path in sorted(shards):
                if total <= self.bytes:
                    break
                if path != part and self._delete_unused(path):
                    total -= size
            if total > self.bytes and not self._has_warned:
                self._has_warned = True
                _log.warning(
                    "%s holds %.2f GB that are all in use, more than data.cache_gb allows; fewer "
                    "workers or a smaller data.window need less",
                    self.folder,
                    total / 1e9,
                )

    def _list_shards(self) -> list[tuple[int, int, Path]]:
        """Returns (time of last use, bytes when whole, path) of all shards and parts."""
        found = {}  # once each: a part gets its name while the folder is listed
        for entry in os.scandir(self.folder):
            match = CACHED_SHARD_PATTERN.fullmatch(entry.name)
            if match and entry.is_file(follow_symlinks=False):
                name = entry.name.removesuffix(PARTIAL_SUFFIX)
                with suppress(FileNotFoundError):
                    found[name] = entry.stat().st_mtime_ns, int(match[1]), Path(entry.path)
        return list(found.values())

    def _delete_unused(self, path: Path) -> bool:
        """Deletes a shard that nobody reads, or a part that nobody writes."""
        lock = path
        if path.name.endswith(PARTIAL_SUFFIX):
            lock = self.folder / "locks" / path.name.removesuffix(PARTIAL_SUFFIX)
        try:
            with hold_lock(lock, wait=False):
                path.unlink(missing_ok=True)
        except BlockingIOError:
            return False
        return True
