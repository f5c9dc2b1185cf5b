"""Kernel locks on files and directories: the kernel frees them when a process ends, however."""

import errno
import fcntl
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ldm.utils.files import check_no_links

LOCK_HELD_ERRNOS = (errno.EACCES, errno.EAGAIN)  # all others are about the file system
LOCK_TIMEOUT = 120.0  # an NFS server holds the locks of a silent machine for 90 s


class InUseError(OSError):
    """Another process works in the directory."""


@contextmanager
def hold_lock(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds the flock of a file (created if missing) or folder, among processes of one machine.

    Raises BlockingIOError if another process holds it and `wait` is false.
    """
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        # Closing is not enough: a child that was forked meanwhile shares the lock.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def lock_directory(directory: Path, *, timeout: float = LOCK_TIMEOUT) -> BinaryIO:
    """Locks a run or a sweep for this process, until it ends or closes the returned file.

    This is a POSIX record lock: children do not inherit it, and NFS supports it. A holder on
    another machine may have died unnoticed, so it gets `timeout` seconds.
    Raises InUseError, which names the holder, and ValueError if `.lock` is a link.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / ".lock"
    check_no_links(directory, [path.name])
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    file = os.fdopen(descriptor, "r+b", buffering=0)
    start, is_announced = time.monotonic(), False
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in LOCK_HELD_ERRNOS:
                warnings.warn(
                    f"the file system of {directory} knows no locks ({error.strerror}): nothing "
                    "keeps a second process from working in it",
                    stacklevel=2,
                )
                break
            file.seek(0)
            holder, _, machine = file.read().decode().strip().partition("\n")
            is_remote = machine not in ("", machine_id())
            waited = time.monotonic() - start
            if waited > (timeout if is_remote else 0.5):
                file.close()
                gone = f" (if that machine is gone for good, delete {path})" if is_remote else ""
                raise InUseError(
                    f"{directory} is being worked on by {holder or 'another process'}: wait for "
                    f"it, stop it, or give another name=...{gone}"
                ) from error
            if waited > 0.5 and not is_announced:
                is_announced = True
                print(
                    f"{directory} is locked by {holder}: waiting up to {timeout:.0f} s, in case "
                    "it has died and the file server has not noticed yet",
                    flush=True,
                )
            time.sleep(0.5 if is_announced else 0.05)  # `is_directory_locked` locks for a moment
    file.truncate(0)
    file.seek(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n{machine_id()}\n".encode())
    return file


def is_directory_locked(directory: Path) -> bool:
    """Returns whether another process holds `lock_directory`.

    A process that calls this for a directory that it has locked itself loses its lock.
    """
    try:
        if not (path := directory / ".lock").is_file():  # opening a pipe would block
            return False
        with path.open("rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError as error:
        return error.errno in LOCK_HELD_ERRNOS
    return False


def machine_id() -> str:
    """Returns the boot id of the running kernel, which alone frees the locks of its processes."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.is_file() else socket.gethostname()
