"""A training that is killed again and again: python tests/helpers/kills.py COUNT SEED OVERRIDE ...

Each life is a fork of this process, which has imported all that a training needs, so that a hundred
of them cost little. Prints a line of JSON: how many were killed, and how the last one ended.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import lightning  # noqa: F401
import torch

import ldm.config.run
import ldm.training.loggers.wandb  # noqa: F401
from ldm.cli.train import train_command
from ldm.config.command_line import run_command

torch.set_num_threads(1)


def live(overrides: list[str], log: Path) -> int:
    """Begin or go on with the run in a process group of its own; its process id."""
    child = os.fork()
    # Both set it, for whichever comes first: a child may be killed before it has run a line.
    os.setpgid(child, 0)
    if child != 0:
        return child
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = ["train.py", *overrides]
        run_command(train_command, "train")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        sys.stdout.flush()
        os._exit(code)


def main(count: int, seed: int, overrides: list[str]) -> None:
    """Kill `count` lives at random moments, then let the last one finish."""
    rng = random.Random(seed)
    log = Path(f"kills-{seed}.log")
    name = next(text for text in overrides if text.startswith("name=")).partition("=")[2]
    saved = Path("runs", name, "checkpoints")
    killed = 0
    while True:
        begun, newest = starts(log), last(saved)
        child = live(overrides, log)
        if killed < count:
            # Some die while they start, some before their first step, most while they train.
            kind = rng.choice(["start", "begun", "trains", "trains", "trains"])
            if kind == "begun":
                watch(child, lambda seen=begun: starts(log) > seen, 120)
            elif kind == "trains":
                watch(child, lambda seen=newest: last(saved) != seen, 120)
            moment = time.monotonic() + rng.uniform(0.0, 0.4)
            watch(child, lambda at=moment: time.monotonic() >= at, 1)
        if killed < count and not has_ended(child):
            os.killpg(child, signal.SIGKILL)
            killed += 1
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            break
    print(json.dumps({"killed": killed, "exit_code": os.WEXITSTATUS(status)}))


def starts(log: Path) -> int:
    """How many lives have come as far as their training."""
    return log.read_bytes().count(b" steps of ") if log.exists() else 0


def last(saved: Path) -> str:
    """The newest checkpoint's name."""
    return max((path.name for path in saved.glob("step=*.ckpt.json")), default="")


def has_ended(child: int) -> bool:
    """Whether a child is gone, leaving its status for later."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def watch(child: int, until: Callable[[], bool], seconds: float) -> None:
    """Wait for something, while the child lives."""
    deadline = time.monotonic() + seconds
    while not until() and not has_ended(child) and time.monotonic() < deadline:
        time.sleep(0.005)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
