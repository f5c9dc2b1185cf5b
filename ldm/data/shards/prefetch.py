"""Downloads the next shards of a run before they are needed, in a process of its own.

A process, because data workers that are forked during a download would inherit its locks.
`python -m ldm.data.shards.prefetch` is that process: it reads one JSON line a shard and ends when
its standard input ends.
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict

from ldm.data.shards.cache import ShardCache
from ldm.data.shards.remote import RemoteShard
from ldm.utils.signals import block_stop_signals

MAX_CONCURRENT_DOWNLOADS = 4
_MAX_SHARDS_AHEAD = 16  # beyond the window in use
_log = logging.getLogger(__name__)


class ShardPrefetcher:
    """Downloads what a run needs next, up to half of the cache.

    upcoming: endless, see `SampleOrder.shards_from`.
    """

    def __init__(
        self, cache: ShardCache, upcoming: Iterator[tuple[int, RemoteShard]], *, window: int
    ) -> None:
        self._cache, self._upcoming = cache, upcoming
        self._max_sent = window + _MAX_SHARDS_AHEAD
        self._sent: list[tuple[int, RemoteShard]] = []
        self._next = next(upcoming)
        self._process: subprocess.Popen | None = None
        self._is_lost = False

    def advance_to(self, position: int) -> None:
        """Requests the shards that are needed from `position` on."""
        self._sent = [one for one in self._sent if one[0] > position]
        room = self._cache.bytes // 2 - sum(shard.size for _, shard in self._sent)
        while len(self._sent) < self._max_sent and (not self._sent or self._next[1].size <= room):
            self._send(self._next[1])
            room -= self._next[1].size
            self._sent.append(self._next)
            self._next = next(self._upcoming)

    def close(self) -> None:
        """Ends the process; the next one continues its downloads."""
        if self._process is not None:
            self._process.kill()  # closing its input is not enough: forked workers hold it open
            self._process.wait()
            with suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process = None

    def _send(self, shard: RemoteShard) -> None:
        if self._is_lost:
            return
        if self._process is None:
            self._process = self._start_process()
        try:
            self._process.stdin.write(json.dumps(asdict(shard)) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:  # not fatal: workers download what is missing themselves
            _log.warning("the process that fetches shards ahead has ended; going on without")
            self._is_lost = True

    def _start_process(self) -> subprocess.Popen:
        folder = str(self._cache.folder.absolute())
        command = [sys.executable, "-m", "ldm.data.shards.prefetch", folder, str(self._cache.bytes)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with block_stop_signals():  # they are for the run, which saves first
            return subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=env)


def main() -> None:
    """Downloads the shards that standard input names, until it ends."""
    cache = ShardCache(sys.argv[1], gigabytes=int(sys.argv[2]) / 1e9)

    def fetch(line: str) -> None:
        with suppress(OSError, ValueError):  # a worker that needs the shard raises the same
            cache.close(cache.open(RemoteShard(**json.loads(line))))

    pool = ThreadPoolExecutor(MAX_CONCURRENT_DOWNLOADS)
    for line in sys.stdin:
        pool.submit(fetch, line)
    pool.shutdown(wait=False, cancel_futures=True)
    os._exit(0)  # does not wait for downloads


if __name__ == "__main__":
    main()
