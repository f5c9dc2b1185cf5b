"""What several ranks must settle among themselves when one of them fails."""

import fcntl
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import lightning as L
from torch.distributed.tensor import DTensor

from ldm.utils.signals import STOP_SIGNALS, block_stop_signals

FIRST_ERROR_FILE = "error.txt"
LAST_SAVE_TIMEOUT = 60.0  # seconds that a rank which has failed gives the first one's save
RANK_EXIT_TIMEOUT = 3.0  # seconds in which a rank that still can ends by itself


def format_exception(error: BaseException) -> str:
    """Kind and message of an error; of one that a data worker has sent, without its trace."""
    kind, text = type(error).__name__, str(error)
    if "Original Traceback (most recent call last)" in text:
        text = text.rpartition(f"{kind}: ")[2].strip()
    return f"{kind}: {text}"


def record_first_error(run_dir: Path, error: BaseException, *, rank: int) -> tuple[str, bool]:
    """The error of the rank that failed first, and whether it was this one.

    The others fail because of it, with nothing to tell but that they were left: the first one has
    left its words in the run directory before its connections closed.
    """
    said = f"{format_exception(error)} [rank {rank} on {socket.gethostname()}]"
    try:
        with (run_dir / FIRST_ERROR_FILE).open("x") as file:
            file.write(said)
    except FileExistsError:
        return (run_dir / FIRST_ERROR_FILE).read_text() or said, False
    except OSError:  # no room on the disk
        return said, rank == 0
    return said, True


def remove_first_error(run_dir: Path) -> None:
    """Remove what an earlier call of the run has left."""
    (run_dir / FIRST_ERROR_FILE).unlink(missing_ok=True)


@contextmanager
def lock_checkpoint_writer(folder: Path) -> Iterator[None]:
    """Only one process is in this block at a time, where the file system can lock."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".writing", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with suppress(OSError):
            fcntl.lockf(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def wait_for_file(path: Path) -> None:
    """Until another rank has written a file, or should have."""
    deadline = time.monotonic() + LAST_SAVE_TIMEOUT
    while not path.is_file() and time.monotonic() < deadline:
        time.sleep(0.05)


def has_sharded_weights(module: L.LightningModule) -> bool:
    """Whether each rank has a part of the weights only."""
    return any(isinstance(weight, DTensor) for weight in module.parameters())


def defer_launch_signals(trainer: L.Trainer) -> None:
    """Have the ranks that Lightning starts get no signal that asks to stop before they listen.

    One that ended while it is still importing would have Lightning kill all.
    """
    launcher = trainer.strategy.launcher
    if launcher is None or not hasattr(launcher, "procs"):
        return
    launch = launcher.launch

    def launch_withheld(function: Callable, *args, **kwargs) -> object:
        def listening(*args, **kwargs) -> object:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            return function(*args, **kwargs)

        with block_stop_signals():
            return launch(listening, *args, **kwargs)

    launcher.launch = launch_withheld


def detach_ranks(trainer: L.Trainer) -> list[subprocess.Popen]:
    """Take the ranks that Lightning has started out of its care, and return them.

    When one of them has failed it kills all, this process too, within five seconds: a save that is
    under way, and the telling of it, may take longer.
    """
    started = getattr(trainer.strategy.launcher, "procs", [])
    taken, started[:] = list(started), []
    return taken


def terminate_ranks(started: list[subprocess.Popen]) -> None:
    """See that these ranks end: one may wait in vain for a rank that has failed."""
    deadline = time.monotonic() + RANK_EXIT_TIMEOUT
    for process in started:
        try:
            process.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            process.kill()
