"""Files that are there in full or not at all."""

import codecs
import itertools
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO

TEMPORARY_SUFFIX = ".tmp"
TEMPORARY_PATTERN = re.compile(rf"\.[0-9a-f]{{8}}{re.escape(TEMPORARY_SUFFIX)}$")
MAX_NAME_BYTES = 255  # of one name, on nearly all file systems
MAX_PATH_BYTES = 4095  # of a whole path, on Linux
PACKAGED_PREFIX = "packaged:"


@contextmanager
def replace_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the name `path` once the block has ended without an error.

    It is written under a temporary name in the same directory, synced, then renamed, so a reader
    or a kill meets the old file or the new one. An OSError of the block or of ours names `path`.
    """
    stem = os.fsdecode(os.fsencode(path.name)[:200])  # a long name has room for what follows
    temporary = path.with_name(f"{stem}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # of a full disk, whose error names no file
        raise


@contextmanager
def reserve_files(
    family: Callable[[str], Sequence[Path]], *, overwrite: bool = False
) -> Iterator[Sequence[Path]]:
    """Files that this process alone writes while the block lasts, and that replace none.

    `family(number)` are their names with "" or "-2", "-3", .. appended: the first of which no file
    is there. It prints where that is not the first. Empty files keep the names meanwhile; those
    that nothing was written to go at the end. overwrite: the first names, whatever is there.
    """
    wanted = family("")
    if overwrite:
        yield wanted
        return
    for number in itertools.count(1):
        paths = wanted if number == 1 else family(f"-{number}")
        if _create_empty_files(paths):
            break
    if number > 1:
        print(f"{wanted[0]} is there already: now {paths[0]}; overwrite=true replaces it")
    try:
        yield paths
    finally:
        for path in paths:
            with suppress(FileNotFoundError):
                if path.stat().st_size == 0:
                    path.unlink()


def _create_empty_files(paths: Sequence[Path]) -> bool:
    """Make all these files, empty; False, and none of them, where one is there already."""
    for count, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.touch(exist_ok=False)
        except OSError as error:
            for made in paths[:count]:
                made.unlink()
            if not isinstance(error, FileExistsError):
                raise
            return False
    return True


def check_path_length(setting: str, path: Path, *, more: int = 0) -> None:
    """ValueError where a name in the path of a setting has over 255 bytes, or the path over 4095.

    more: bytes that will be appended to the last name.
    """
    name = max([len(os.fsencode(path.name)) + more, *(len(os.fsencode(p)) for p in path.parts)])
    whole = len(os.fsencode(path.absolute())) + more
    over = max(name - MAX_NAME_BYTES, whole - MAX_PATH_BYTES)
    if over > 0:
        raise ValueError(f"{setting}={str(path)[:60]}.. is {over} bytes too long for a file's name")


def check_no_links(folder: Path, names: Iterable[str]) -> None:
    """ValueError where one of these in a folder is a link: what is written to it is lost elsewhere.

    For files that are opened by their names, and not replaced as a whole.
    """
    for name in names:
        if (path := folder / name).is_symlink():
            raise ValueError(
                f"{path} is a link to {os.readlink(path)}, which would be written over: delete the "
                "link, or give another place"
            )


def delete_temporary_files(folder: Path, pattern: str = "*") -> None:
    """Delete what `replacing` has left in a folder where it was killed, and no file of others."""
    for path in folder.glob(f"{pattern}{TEMPORARY_SUFFIX}"):
        if TEMPORARY_PATTERN.search(path.name) and not path.is_dir():
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a small text file."""
    with replace_file(path) as file:
        file.write(text.encode())


def check_writable(folder: Path) -> None:
    """Raises OSError, with the remedy, where a folder takes no files or no links."""
    probe = folder / f"probe.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.symlink_to("last.ckpt")
        probe.unlink()
        write_text(probe, "0" * 4096)
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"checkpoints cannot be written to {folder} ({error.strerror or error}): make room "
            "there, or take a name whose directory lies elsewhere"
        ) from error


def read_text(path: str | Path, *, max_bytes: int | None = None) -> str:
    """The text of a user's file, in UTF-8 with or without byte order mark, or UTF-16 with one.

    most: bytes, where the path may come from anyone: a larger file, a pipe or a device is refused.
    Raises ValueError, which names the file, for anything else, and OSError where it is not there.
    """
    data = (
        Path(path).read_bytes()
        if max_bytes is None
        else read_regular_file(Path(path), max_bytes=max_bytes)
    )
    try:
        text = data.decode(detect_encoding(data))
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # UTF-16 without a mark has them, as a picture has
        raise ValueError(f"{path} is neither UTF-8 nor UTF-16 with a byte order mark: save it so")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def detect_encoding(data: bytes) -> str:
    """Python's name of the encoding that text begins to be in: UTF-16 with a mark, else UTF-8."""
    is_wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return "utf-16" if is_wide else "utf-8-sig"


def read_regular_file(path: Path, *, max_bytes: int) -> bytes:
    """The bytes of a file that may come from anywhere, at most so many.

    Raises ValueError where it is larger or no file, as a pipe, which would be waited for.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        stat = os.fstat(descriptor)
        if not S_ISREG(stat.st_mode):
            raise ValueError(f"{path} is no file")
        if stat.st_size > max_bytes:
            raise ValueError(f"{path} has {stat.st_size} bytes, {max_bytes} are the most")
        return open(descriptor, "rb", closefd=False).read(max_bytes)
    finally:
        os.close(descriptor)


def resolve_path(path: str | Path) -> Path:
    """The place that a setting names; `packaged:NAME` is what comes with ldm under that name.

    `~` is the home directory. Without one it stays, as all other letters do.
    Raises FileNotFoundError where nothing comes with ldm under that name.
    """
    path = str(path)
    if path.startswith(PACKAGED_PREFIX):
        assets = Path(__file__).parent.parent / "assets"
        if not (place := assets / path.removeprefix(PACKAGED_PREFIX)).is_dir():
            names = ", ".join(PACKAGED_PREFIX + part.name for part in sorted(assets.iterdir()))
            raise FileNotFoundError(f"'{path}' does not come with ldm, which has {names}")
        return place
    return Path(os.path.expanduser(path))
