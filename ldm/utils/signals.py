"""Handles the signals that ask a run to stop."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import parent_process

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
EX_TEMPFAIL = 75  # of sysexits.h: try again


class StopSignals:
    """Handles the signals that ask this process to stop.

    The first one sets `received`, so that a training can save first; while `at_once` is true, it
    raises SystemExit. A second one, a second later or more, always does. Forks do not.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.at_once = at_once
        self.received: int | None = None
        self.received_at = 0.0

    def listen(self) -> None:
        """Replaces the handlers of all these signals at the same moment; only in the main thread.

        Python allows handlers in no other thread.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        self.process = os.getpid()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)
        # This also undoes a `block_stop_signals` in which this process was started.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def leave_at_once(self) -> None:
        """From now on a signal ends the process, also one that was received before."""
        self.at_once = True
        if self.received is not None:
            raise SystemExit(self.code())

    @contextmanager
    def exit_on_signal(self) -> Iterator[None]:
        """Raises SystemExit after a signal in this block while `at_once` is true.

        Libraries may catch the SystemExit of the handler, or raise another error instead.
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
        """Returns the exit code: 75 (the same command resumes), or 130 after SIGINT."""
        return 130 if self.received == signal.SIGINT else EX_TEMPFAIL

    def requeue(self) -> None:
        """Asks SLURM to run this job again after a user signal, which says that its time ends."""
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
        # Not print: a signal may interrupt another print.
        with suppress(OSError):
            os.write(1, f"{signal.Signals(number).name}: {how}\n".encode())
        if self.at_once:
            raise SystemExit(self.code())


@contextmanager
def restore_signal_handlers() -> Iterator[None]:
    """The handlers of the stop signals after this block are those before it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # of C code
                signal.signal(number, handler)


@contextmanager
def block_stop_signals() -> Iterator[None]:
    """Lets processes that are started in this block ignore the stop signals.

    A terminal, timeout, systemd or SLURM send them to all processes of a run, which still needs its
    data workers. Signals to this process wait for the end of the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stop_with_parent(worker: int = 0) -> None:
    """Ends a worker that was started in `block_stop_signals` on SIGTERM of its parent only."""
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        return
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = parent_process().pid
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)
