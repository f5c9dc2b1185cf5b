"""Who works in a directory: one process at a time."""

import errno
import fcntl
import os
import socket
import time
import warnings
from pathlib import Path
from typing import BinaryIO

from ldm.utils.files import check_no_links

LOCK_HELD_ERRNOS = (errno.EACCES, errno.EAGAIN)  # what else lockf says is about the file system
# Longer than the 90 s for which an NFS server keeps the locks of a machine that fell silent.
LOCK_TIMEOUT = 120.0


class InUseError(OSError):
    """A directory that another process works in."""


def lock_directory(directory: Path, *, timeout: float = LOCK_TIMEOUT) -> BinaryIO:
    """Take a run or a sweep for this process, until it ends or the returned file is closed.

    A POSIX record lock: the kernel frees it with the process, however that ends; children do not
    inherit it, and NFS knows it. A holder on another machine, which may be dead without the file
    server knowing, is waited for, `patience` seconds. Raises InUseError, which names the holder,
    and ValueError where the file that is locked is a link.
    Where the file system has no locks, it warns and takes the directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / ".lock"
    check_no_links(directory, [path.name])
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    file = os.fdopen(descriptor, "r+b", buffering=0)
    began, told = time.monotonic(), False
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
            holder, _, where = file.read().decode().strip().partition("\n")
            remote = where not in ("", machine_id())
            waited = time.monotonic() - began
            if waited > (timeout if remote else 0.5):
                file.close()
                gone = f" (where that machine is gone for good, delete {path})" if remote else ""
                raise InUseError(
                    f"{directory} is being worked on by {holder or 'another process'}: wait for "
                    f"it, stop it, or give another name=...{gone}"
                ) from error
            if waited > 0.5 and not told:
                told = True
                print(
                    f"{directory} is locked by {holder}: waiting up to {timeout:.0f} s, in case "
                    "it has died and the file server is yet to notice",
                    flush=True,
                )
            time.sleep(0.5 if told else 0.05)  # `claimed` may be looking
    file.truncate(0)
    file.seek(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n{machine_id()}\n".encode())
    return file


def is_directory_locked(directory: Path) -> bool:
    """Whether another process works in a run's or a sweep's directory.

    To ask for a directory that this process has claimed is to give it up.
    """
    try:
        if not (path := directory / ".lock").is_file():  # a pipe would be waited for
            return False
        with path.open("rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError as error:
        return error.errno in LOCK_HELD_ERRNOS
    return False


def machine_id() -> str:
    """What tells a running kernel, which frees the locks of its dead, from any other's."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.is_file() else socket.gethostname()
