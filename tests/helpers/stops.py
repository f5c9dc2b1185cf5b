"""A start that is stopped at COUNT + 1 moments: python tests/stops.py SIGNAL COUNT OVERRIDE ...

Each life is a fork of this process (see kills.py), and its whole process group gets the signal: the
first one when it begins to train, the others earlier and earlier. One more is left to finish.
Prints a line of JSON: of each life how it ended, and what it printed.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import kills


def main(number: int, count: int, overrides: list[str]) -> None:
    """Stop lives, then let one finish."""
    name = next(text for text in overrides if text.startswith("name=")).partition("=")[2]
    result = Path("runs", name, "result.json")
    lives: list[dict] = []
    start = 60.0  # seconds; measured in the first life
    for moment in [*range(count, -1, -1), None]:
        log = Path(f"stops-{name}-{len(lives)}.log")
        log.unlink(missing_ok=True)
        result.unlink(missing_ok=True)
        began = time.monotonic()
        child = kills.live(overrides, log)
        if moment is not None:
            ends = began + start * moment / count
            trains = lambda log=log: log.exists() and "Training" in log.read_text()  # noqa: E731
            kills.watch(child, lambda at=ends, t=trains: time.monotonic() >= at or t(), 60)
            start = min(start, time.monotonic() - began) if moment == count else start
            if not kills.has_ended(child):
                os.killpg(child, number)
        kills.watch(child, lambda: False, 120)
        if not (ended := kills.has_ended(child)):
            os.killpg(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        lives.append(
            {
                "moment": moment,
                "code": code if ended else "hangs",
                "said": log.read_text() if log.exists() else "",
                "result": json.loads(result.read_text()) if result.exists() else {},
            }
        )
    print(json.dumps(lives))


if __name__ == "__main__":
    main(getattr(signal, sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
