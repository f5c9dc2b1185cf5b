"""The next shards of a run, fetched before they are needed.

`Ahead` walks along with the order and tells a process of its own which shards come next: a fork of
data workers in the midst of downloads would inherit their locks.
`python -m ldm.data.shards.prefetch` is that process; it reads one JSON
line a shard, and ends with whoever writes them.
"""

import json
import logging
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict

from ldm.data.shards.cache import ShardCache
from ldm.data.shards.remote import RemoteShard
from ldm.utils.signals import block_stop_signals

MAX_CONCURRENT_DOWNLOADS = 4  # downloads of a process
_MAX_SHARDS_AHEAD = 16  # shards ahead, beyond the window in use
_log = logging.getLogger(__name__)


class ShardPrefetcher:
    """Fetches what a run needs next, up to half of the cache.

    upcoming: (position from which on it is no longer needed, shard) in the order of their use,
    without end.
    """

    def __init__(
        self, cache: ShardCache, upcoming: Iterator[tuple[int, RemoteShard]], *, window: int
    ) -> None:
        self._cache, self._upcoming = cache, upcoming
        self._most = window + _MAX_SHARDS_AHEAD
        self._sent: deque[tuple[int, RemoteShard]] = deque()
        self._next = next(upcoming)
        self._process: subprocess.Popen | None = None
        self._lost = False

    def advance_to(self, position: int) -> None:
        """Have fetched what is needed next, now that the run is at `position`."""
        while self._sent and self._sent[0][0] <= position:
            self._sent.popleft()
        room = self._cache.bytes // 2 - sum(shard.size for _, shard in self._sent)
        while len(self._sent) < self._most and (not self._sent or self._next[1].size <= room):
            self._send(self._next[1])
            room -= self._next[1].size
            self._sent.append(self._next)
            self._next = next(self._upcoming)

    def close(self) -> None:
        """End the process; what it had begun goes on where it was, another time."""
        if self._process is not None:
            self._process.kill()  # forked workers hold its input open, too
            self._process.wait()
            with suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process = None

    def _send(self, shard: RemoteShard) -> None:
        if self._lost:
            return
        if self._process is None:
            command = [
                sys.executable,
                "-m",
                "ldm.data.shards.prefetch",
                str(self._cache.folder.absolute()),
            ]
            with block_stop_signals():  # they are for the run, which saves first
                self._process = subprocess.Popen(
                    [*command, str(self._cache.bytes)],
                    stdin=subprocess.PIPE,
                    text=True,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                )
        try:
            self._process.stdin.write(json.dumps(asdict(shard)) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:  # it is a help only: workers fetch for themselves what is missing
            _log.warning("the process that fetches shards ahead has ended; going on without")
            self._lost = True


def main() -> None:
    """Fetch the shards that standard input names, side by side, until it ends."""
    cache = ShardCache(sys.argv[1], gigabytes=int(sys.argv[2]) / 1e9)

    def fetch(line: str) -> None:
        with suppress(OSError, ValueError):  # who needs the shard will find the same, and say so
            cache.close(cache.open(RemoteShard(**json.loads(line))))

    pool = ThreadPoolExecutor(MAX_CONCURRENT_DOWNLOADS)
    for line in sys.stdin:
        pool.submit(fetch, line)
    pool.shutdown(wait=False, cancel_futures=True)
    os._exit(0)  # without waiting for downloads


if __name__ == "__main__":
    main()
