"""A start that is stopped at COUNT + 1 moments: python tests/stops.py SIGNALS COUNT OVERRIDE ...

Each life is a fork of this process (see kills.py), and its whole process group gets one of the
signals, in turn: the first life when it begins to train, the others earlier and earlier. One more
is left to finish. Prints a line of JSON: of each life its signal, how it ended, what it printed.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import kills


def main(signals: list[str], count: int, overrides: list[str]) -> None:
    """Stop lives, then let one finish."""
    name = next(text for text in overrides if text.startswith("name=")).partition("=")[2]
    result = Path("runs", name, "result.json")
    lives: list[dict] = []
    start = 60.0  # seconds; measured in the first life
    for moment in [*range(count, -1, -1), None]:
        number = signals[len(lives) % len(signals)]
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
                os.killpg(child, getattr(signal, number))
        kills.watch(child, lambda: False, 120)
        if not (ended := kills.has_ended(child)):
            os.killpg(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        lives.append(
            {
                "moment": moment,
                "signal": number,
                "code": code if ended else "hangs",
                "said": log.read_text() if log.exists() else "",
                "result": json.loads(result.read_text()) if result.exists() else {},
            }
        )
    print(json.dumps(lives))


if __name__ == "__main__":
    main(sys.argv[1].split(","), int(sys.argv[2]), sys.argv[3:])
