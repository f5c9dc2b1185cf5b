"""A start that is stopped at moment after moment: python tests/stops.py SIGNAL SECONDS OVERRIDE ...

Each life is a fork of this process (see kills.py), and its whole process group gets the signal, a
SECONDS later than the life before, until one has begun to train. One more is left to finish.
Prints a line of JSON: of each life how it ended, and what it printed.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import kills


def main(number: int, step: float, overrides: list[str]) -> None:
    """Stop lives, then let one finish."""
    name = next(text for text in overrides if text.startswith("name=")).partition("=")[2]
    result = Path("runs", name, "result.json")
    lives: list[dict] = []
    while not lives or lives[-1]["moment"] is not None:
        trained = bool(lives) and "Training" in lives[-1]["said"]
        moment = None if trained else len(lives) * step
        log = Path(f"stops-{name}-{len(lives)}.log")
        result.unlink(missing_ok=True)
        child = kills.live(overrides, log)
        if moment is not None:
            ends = time.monotonic() + moment
            kills.watch(child, lambda at=ends: time.monotonic() >= at, 60)
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
    main(getattr(signal, sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
