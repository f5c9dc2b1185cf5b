"""Files that are there in full or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".tmp"
PACKAGED = "packaged:"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the name `path` once the block has ended without an error.

    It is written under a temporary name in the same directory, synced, then renamed, so a reader
    or a kill meets the old file or the new one.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a small text file."""
    with replacing(path) as file:
        file.write(text.encode())


def check_writable(folder: Path) -> None:
    """Raises OSError, with the remedy, where a folder takes no files or no links."""
    probe = folder / f"probe{TEMPORARY}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.unlink(missing_ok=True)
        probe.symlink_to("last.ckpt")
        probe.unlink()
        write_text(probe, "0" * 4096)
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"checkpoints cannot be written to {folder} ({error.strerror or error}): make room "
            "there, or take a name whose directory lies elsewhere"
        ) from error


def located(path: str) -> Path:
    """The place that a path names; `packaged:NAME` is what comes with ldm under that name.

    Raises FileNotFoundError where nothing does.
    """
    if path.startswith(PACKAGED):
        assets = Path(__file__).parent / "assets"
        if not (place := assets / path.removeprefix(PACKAGED)).is_dir():
            names = ", ".join(PACKAGED + part.name for part in sorted(assets.iterdir()))
            raise FileNotFoundError(f"'{path}' does not come with ldm, which has {names}")
        return place
    return Path(path).expanduser()
