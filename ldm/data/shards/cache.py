"""A folder of whole shards that came from elsewhere, of a bounded size.

Several processes and runs of one machine may share it. A shard is there in full or not at all
(`.part` until then); whoever reads one holds a shared lock on it, and one that nobody reads leaves
when room is needed, the least recently opened first. Kernel locks: a killed process leaves none.

    cache/<digest>-<bytes>-<name>    cache/index-<digest>.npz    cache/locks/    cache/.ldm-cache

Only files of such names leave, and only out of a folder with the marker `.ldm-cache`, which a
folder gets before the first shard, if there is nothing of others in it.
"""

import fcntl
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from ldm.data.shards.remote import RemoteShard, download_shard
from ldm.utils.files import resolve_path, write_text

PARTIAL_SUFFIX = ".part"
CACHE_MARKER = ".ldm-cache"
CACHED_SHARD_PATTERN = re.compile(
    rf"[0-9a-f]{{16}}-([0-9]{{1,18}})-[\w.-]{{0,80}}?({re.escape(PARTIAL_SUFFIX)})?"
)
# What else lies in a cache: of indices, of the locks, of `ldm.clip` and of `ldm.evaluate`.
CACHE_FILE_PATTERN = re.compile(
    rf"index-[0-9a-f]{{16}}\.npz(\..*)?|locks|clip|real|{re.escape(CACHE_MARKER)}.*"
)
_log = logging.getLogger(__name__)


@contextmanager
def hold_lock(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a file's or folder's lock; BlockingIOError where another does and `wait` is off."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        # Not left to close: a child forked meanwhile has a copy, and the lock would live on in it.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


class ShardCache:
    """Shards of servers, as local files.

    Raises ValueError where the bound is not above 0.
    """

    def __init__(self, folder: str | Path, *, gigabytes: float) -> None:
        if not gigabytes > 0:
            raise ValueError(f"cache_gb must be above 0, got {gigabytes}")
        self.folder = resolve_path(folder)
        self.bytes = int(gigabytes * 1e9)
        self._told = False

    def open(self, remote: RemoteShard) -> FileIO:
        """The shard, downloaded first where it is not there; to be closed by `Cache.close`.

        Raises RemoteError, FileNotFoundError as `download`, ValueError where it is larger than the
        whole cache, or where the folder holds things of others.
        """
        path = self.folder / remote.name
        while True:
            if file := self._reading(path, remote.size):
                return file
            self._claim()
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
            with hold_lock(self._lock(path.name)):
                if path.exists():
                    continue  # somebody else has just fetched it
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
        """Give a shard up: from now on it may leave."""
        fcntl.flock(file.fileno(), fcntl.LOCK_UN)  # see `locked`
        file.close()

    def _reading(self, path: Path, size: int) -> FileIO | None:
        try:
            file = FileIO(path)
        except FileNotFoundError:
            return None
        fcntl.flock(file.fileno(), fcntl.LOCK_SH)
        stat = os.fstat(file.fileno())
        if stat.st_nlink == 0:  # it left between open and lock
            self.close(file)
            return None
        if stat.st_size != size:
            self.close(file)
            path.unlink(missing_ok=True)
            _log.warning("%s was damaged; fetching it again", path)
            return None
        os.utime(path)  # the newest time is the last one to leave
        return file

    def _claim(self) -> None:
        """Mark the folder as a cache, out of which shards may leave."""
        if (self.folder / CACHE_MARKER).is_file():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        names = sorted(os.listdir(self.folder))
        foreign = [
            name
            for name in names
            if not (CACHED_SHARD_PATTERN.fullmatch(name) or CACHE_FILE_PATTERN.fullmatch(name))
        ]
        if foreign:
            raise ValueError(
                f"data.cache={self.folder} holds {foreign[0]!r}, and is no cache: give a new or "
                "empty folder, out of which shards may be deleted"
            )
        write_text(
            self.folder / CACHE_MARKER, "Shards in this folder are copies, and ldm deletes them\n"
        )

    def _lock(self, name: str) -> Path:
        return self.folder / "locks" / name

    def _make_room(self, remote: RemoteShard, part: Path) -> None:
        """Let others leave until this one fits, and create `part`, which keeps its room."""
        if remote.size > self.bytes:
            raise ValueError(
                f"{remote} has {remote.size / 1e9:.2f} GB and does not fit into a cache of "
                f"{self.bytes / 1e9:.2f} GB: raise data.cache_gb"
            )
        with hold_lock(self.folder / "locks" / "room"):
            part.touch()
            present = self._present()
            total = sum(size for _, size, _ in present)
            for _, size, path in sorted(present):
                if total <= self.bytes:
                    break
                if path != part and self._leave(path):
                    total -= size
            if total > self.bytes and not self._told:
                self._told = True
                _log.warning(
                    "%s holds %.2f GB that are all in use, more than data.cache_gb allows; fewer "
                    "workers or a smaller data.window need less",
                    self.folder,
                    total / 1e9,
                )

    def _present(self) -> list[tuple[int, int, Path]]:
        """(time of last use, bytes once it is whole, path) of all shards and parts."""
        found = []
        for entry in os.scandir(self.folder):
            named = CACHED_SHARD_PATTERN.fullmatch(entry.name)
            if named and entry.is_file(follow_symlinks=False):
                with suppress(FileNotFoundError):
                    found.append((entry.stat().st_mtime_ns, int(named[1]), Path(entry.path)))
        return found

    def _leave(self, path: Path) -> bool:
        """Remove a shard that nobody reads, or a part that nobody writes."""
        held = (
            self._lock(path.name.removesuffix(PARTIAL_SUFFIX))
            if path.name.endswith(PARTIAL_SUFFIX)
            else path
        )
        try:
            with hold_lock(held, wait=False):
                path.unlink(missing_ok=True)
        except BlockingIOError:
            return False
        return True
