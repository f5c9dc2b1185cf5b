"""Who works in a directory: one process at a time."""

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import BinaryIO


class InUseError(OSError):
    """A directory that another process works in."""


def claim(directory: Path) -> BinaryIO:
    """Take a run or a sweep for this process, until it ends or the returned file is closed.

    A POSIX record lock: the kernel frees it with the process, however that ends; children do not
    inherit it, and NFS knows it. Raises InUseError, which names the holder.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / ".lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    file = os.fdopen(descriptor, "r+b", buffering=0)
    for attempt in range(10):
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if attempt == 9:
                holder = file.read().decode() or "another process"
                file.close()
                raise InUseError(
                    f"{directory} is being worked on by {holder}: wait for it, stop it, or give "
                    "another name=..."
                ) from error
            time.sleep(0.05)  # `claimed` may be looking
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    return file


def claimed(directory: Path) -> bool:
    """Whether another process works in a run's or a sweep's directory.

    To ask for a directory that this process has claimed is to give it up.
    """
    try:
        with (directory / ".lock").open("rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
