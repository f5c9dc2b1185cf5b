"""The error of the rank that failed first, for all ranks of a run."""

import socket
from pathlib import Path

FIRST_ERROR_FILE = "error.txt"


def format_exception(error: BaseException) -> str:
    """Returns type and message of an error; of a data worker's error, without its traceback."""
    kind, text = type(error).__name__, str(error)
    if "Original Traceback (most recent call last)" in text:
        text = text.rpartition(f"{kind}: ")[2].strip()
    return f"{kind}: {text}"


def record_first_error(run_dir: Path, error: BaseException, *, rank: int) -> tuple[str, bool]:
    """Returns the error of the rank that failed first, and whether that is this rank.

    The first rank writes its error into the run directory before its connections close. The other
    ranks fail after that, because of the closed connections.
    """
    message = f"{format_exception(error)} [rank {rank} on {socket.gethostname()}]"
    path = run_dir / FIRST_ERROR_FILE
    try:
        with path.open("x") as file:
            file.write(message)
    except FileExistsError:
        return path.read_text() or message, False
    except OSError:  # a full disk
        return message, rank == 0
    return message, True
