"""Files that are there in full or not at all."""

import codecs
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


def read_text(path: str | Path) -> str:
    """The text of a user's file, in UTF-8 with or without byte order mark, or UTF-16 with one.

    Raises ValueError, which names the file, for anything else, and OSError where it is not there.
    """
    data = Path(path).read_bytes()
    try:
        text = data.decode(encoding(data))
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # UTF-16 without a mark has them, as a picture has
        raise ValueError(f"{path} is neither UTF-8 nor UTF-16 with a byte order mark: save it so")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def encoding(data: bytes) -> str:
    """Python's name of the encoding that text begins to be in: UTF-16 with a mark, else UTF-8."""
    is_wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return "utf-16" if is_wide else "utf-8-sig"


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
