"""Signals that ask a run to stop: it listens from its first line on."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import parent_process

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
EX_TEMPFAIL = 75  # EX_TEMPFAIL of sysexits.h: try again


class StopSignals:
    """Listens to the signals that ask this process to stop.

    The first one is noted in `received`, for a training that saves before it leaves; while
    `at_once` is true, it raises SystemExit. The second one, a second later or more, always does.
    A fork of this process takes them as any program does.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.at_once = at_once
        self.received: int | None = None
        self.received_at = 0.0

    def listen(self) -> None:
        """Take the place of whoever listens now, for all of them at the same moment."""
        self.process = os.getpid()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)
        signal.pthread_sigmask(
            signal.SIG_UNBLOCK, STOP_SIGNALS
        )  # also where this is started `withheld`

    def leave_at_once(self) -> None:
        """From now on a signal ends the process; so does one that was noted before."""
        self.at_once = True
        if self.received is not None:
            raise SystemExit(self.code())

    @contextmanager
    def exit_on_signal(self) -> Iterator[None]:
        """End this block by SystemExit where a signal came while `at_once` was true.

        Libraries catch what the signal raises in the midst of them, or make another error of it.
        """
        try:
            yield
        except Exception as error:
            if self.at_once and self.received is not None:
                raise SystemExit(self.code()) from error
            raise
        if self.at_once:
            self.leave_at_once()

    def code(self) -> int:
        """The exit code: 75 ("the same command goes on"), or 130 after SIGINT."""
        return 130 if self.received == signal.SIGINT else EX_TEMPFAIL

    def requeue(self) -> None:
        """Ask SLURM to run this job again, where a user signal has said that its time ends."""
        job = os.environ.get("SLURM_JOB_ID")
        if job and self.received in (signal.SIGUSR1, signal.SIGUSR2):
            subprocess.run(["scontrol", "requeue", job], check=False, timeout=60)

    def _receive(self, number: int, frame: object) -> None:
        if os.getpid() != self.process:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if self.received is not None:
            if time.monotonic() > self.received_at + 1:  # SLURM sends some in pairs
                raise SystemExit(128 + number)
            return
        self.received, self.received_at = number, time.monotonic()
        how = "leaving" if self.at_once else "saving after this step, then leaving"
        # Not print: it must not be called in the midst of another print.
        with suppress(OSError):
            os.write(1, f"{signal.Signals(number).name}: {how}\n".encode())
        if self.at_once:
            raise SystemExit(self.code())


@contextmanager
def block_stop_signals() -> Iterator[None]:
    """Processes that are started in this block do not get these signals, unless they ask for them.

    Who sends a signal to all processes of a run (a terminal, timeout, systemd, SLURM) asks the run
    to stop, and the run still needs its data workers. What arrives here waits for the block's end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stop_with_parent(worker: int = 0) -> None:
    """Have a worker that was started in `withheld` end by its parent's SIGTERM alone."""
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        return
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = parent_process().pid
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)
