"""Files: written whole or not at all, read with a size limit, and named by settings."""

import codecs
import itertools
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO

TEMPORARY_SUFFIX = ".tmp"
TEMPORARY_PATTERN = re.compile(rf"\.[0-9a-f]{{8}}{re.escape(TEMPORARY_SUFFIX)}$")
MAX_NAME_BYTES = 255  # of one name, on nearly all file systems
MAX_PATH_BYTES = 4095  # of a whole path, on Linux
MAX_JSON_BYTES = 2**26
PACKAGED_PREFIX = "packaged:"
BUNDLE_FILE = "bundle.json"  # makes a folder a bundle


@contextmanager
def replace_file(path: Path) -> Iterator[BinaryIO]:
    """Yields a file that takes the name `path` if the block ends without an error.

    It is written to a temporary name in the same directory, synced and renamed: a reader sees the
    old file or the new one, also after a kill. An OSError names `path`.
    """
    stem = os.fsdecode(os.fsencode(path.name)[:200])  # leaves room for the suffix
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
            error.filename = str(path)  # the error of a full disk names no file
        raise


def delete_temporary_files(folder: Path, pattern: str = "*") -> None:
    """Deletes what a killed `replace_file` left in a folder, and nothing else."""
    for path in folder.glob(f"{pattern}{TEMPORARY_SUFFIX}"):
        if TEMPORARY_PATTERN.search(path.name) and not path.is_dir():
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replace_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1))


@contextmanager
def reserve_files(
    family: Callable[[str], Sequence[Path]], *, overwrite: bool = False
) -> Iterator[Sequence[Path]]:
    """Yields paths that no file has and that this process alone writes during the block.

    `family("")` returns the paths, `family("-2")`, `family("-3"), ..` the alternatives; a line says
    which. Files that are still empty at the end are deleted. overwrite: yields `family("")` anyway.
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
    """Creates all files, or none and returns False if one exists."""
    for count, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.touch(exist_ok=False)
        except OSError as error:
            for created in paths[:count]:
                created.unlink()
            if not isinstance(error, FileExistsError):
                raise
            return False
    return True


def check_path_length(setting: str, path: Path, *, more: int = 0) -> None:
    """Raises ValueError if a path, with `more` bytes at its end, is too long for the system."""
    name = max([len(os.fsencode(path.name)) + more, *(len(os.fsencode(p)) for p in path.parts)])
    whole = len(os.fsencode(path.absolute())) + more
    excess = max(name - MAX_NAME_BYTES, whole - MAX_PATH_BYTES)
    if excess > 0:
        raise ValueError(
            f"{setting}={str(path)[:60]}.. is {excess} bytes too long for a file's name"
        )


def check_no_links(folder: Path, names: Iterable[str]) -> None:
    """Raises ValueError if one of these files, which are written in place, is a symbolic link."""
    for name in names:
        if (path := folder / name).is_symlink():
            raise ValueError(
                f"{path} is a link to {os.readlink(path)}, which would be overwritten: delete the "
                "link, or use another folder"
            )


def check_writable(folder: Path) -> None:
    """Raises OSError, with the remedy, if files or links cannot be created in a folder."""
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


def read_regular_file(path: Path, *, max_bytes: int) -> bytes:
    """Returns the bytes of an untrusted file; ValueError for a larger one, a pipe or a device."""
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


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Returns the value of a JSON file; raises ValueError if it is damaged or too large."""
    try:
        return json.loads(read_regular_file(path, max_bytes=max_bytes))
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deep") from error


def read_json_mapping(path: Path) -> dict[str, Any]:
    """As `read_json`, of a mapping; the ValueError names the file."""
    try:
        value = read_json(path)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is no mapping of settings")
    return value


def read_text(path: str | Path, *, max_bytes: int | None = None) -> str:
    """Returns the text of a user's file: UTF-8, or UTF-16 with a byte order mark; else ValueError.

    max_bytes: reads it as an untrusted file.
    """
    if max_bytes is None:
        data = Path(path).read_bytes()
    else:
        data = read_regular_file(Path(path), max_bytes=max_bytes)
    try:
        text = data.decode(detect_encoding(data))
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # UTF-16 without a mark, or an image
        raise ValueError(f"{path} is neither UTF-8 nor UTF-16 with a byte order mark: save it so")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def detect_encoding(data: bytes) -> str:
    """Returns Python's codec for a text: UTF-16 if it has that byte order mark, else UTF-8."""
    is_wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return "utf-16" if is_wide else "utf-8-sig"


def resolve_path(path: str | Path) -> Path:
    """Returns the path of a setting: `~` is the home directory, `packaged:NAME` in ldm/assets."""
    path = str(path)
    if path.startswith(PACKAGED_PREFIX):
        assets = Path(__file__).parent.parent / "assets"
        if not (asset := assets / path.removeprefix(PACKAGED_PREFIX)).is_dir():
            names = ", ".join(PACKAGED_PREFIX + part.name for part in sorted(assets.iterdir()))
            raise FileNotFoundError(f"'{path}' does not come with ldm, which has {names}")
        return asset
    return Path(os.path.expanduser(path))
