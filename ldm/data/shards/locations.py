"""From `data.train`, a folder, glob, brace range or URL, to its shards in order."""

import glob
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from braceexpand import (
    UnbalancedBracesError,  # pyrefly: ignore[missing-module-attribute]  # not in its stubs
    braceexpand,
)

from ldm.data.shards.remote import RemoteShard, describe_urls, find_urls, redact_url
from ldm.utils.files import resolve_path

ShardSource = str | Path | Sequence[str | Path | Mapping[str, Any]]  # see `data_sets`
MAX_SHARDS = 1_000_000


def locate_shards(source: ShardSource) -> list[Path | RemoteShard]:
    """Returns the shards of a folder, .tar file, glob, brace range or URL, or of a list of these.

    Folders and globs are in order of name; a shard that is listed twice is there twice.
    """
    sources = [source] if isinstance(source, (str, Path)) else source
    sources = [str(each) if is_url(str(each)) else str(resolve_path(each)) for each in sources]
    found = [
        shard for text in sources for one in _expand_braces(text) for shard in _list_shards(one)
    ]
    if not found:
        folders = (Path(text) for text in sources if not is_url(text))
        below = sorted({tar.parent for folder in folders for tar in folder.glob("*/*.tar")})
        if below:
            raise FileNotFoundError(
                f"no .tar shards in {redact_source(source)} itself, but in "
                f"{', '.join(map(str, below[:8]))}"
            )
        raise FileNotFoundError(
            f"no .tar shards in {redact_source(source)}; `python -m ldm.prepare` writes them"
        )
    if len(found) > MAX_SHARDS:
        raise ValueError(f"{redact_source(source)}: more than {MAX_SHARDS:,} shards")
    for path in found:
        if isinstance(path, Path) and not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is no file, but a pipe, a device or a link to nothing")
    remotes = iter(describe_urls([url for url in found if isinstance(url, str)]))
    return [next(remotes) if isinstance(shard, str) else shard for shard in found]


def redact_source(source: ShardSource) -> str:
    """Returns a source for messages, without credentials."""
    if isinstance(source, (str, Path)):
        return redact_url(str(source)) if is_url(str(source)) else str(source)
    if isinstance(source, Mapping):
        return redact_source(source["path"])
    return f"[{', '.join(redact_source(one) for one in source)}]"


def is_url(text: str) -> bool:
    return "://" in text


def _expand_braces(text: str) -> Iterable[str]:
    """`a-{00..02}.tar` is three, as in a shell; a name that exists stays as it is."""
    if "{" not in text or Path(text).exists():
        return [text]
    ends = re.findall(r"\{(-?\d+)\.\.(-?\d+)", text)
    if math.prod(abs(int(first) - int(last)) + 1 for first, last in ends) > MAX_SHARDS:
        raise ValueError(f"{redact_source(text)}: more than {MAX_SHARDS:,} shards")
    try:
        return list(itertools.islice(braceexpand(text), MAX_SHARDS + 1))
    except UnbalancedBracesError:
        raise ValueError(f"{redact_source(text)}: a brace is not closed, or not opened") from None


def _list_shards(text: str) -> list[Path | str]:
    if text.lstrip().startswith(("pipe:", "|")):
        raise ValueError(
            "data: a pipe: source runs a command, which data may not do: stage the shards in a "
            "folder, or name their https://, s3:// or gs:// address"
        )
    if not is_url(text):
        return _list_local_shards(text)
    if urlsplit(text).password:
        raise ValueError(
            f"{redact_source(text)}: a password in an address would be written into the run's "
            "files; ~/.netrc (for a web server) or the environment (for s3, gs) is the place for it"
        )
    if "::" in text:
        raise ValueError(f"{redact_source(text)}: '::' joins addresses; give a list of them")
    if text.startswith(("file://", "local://")):
        return _list_local_shards(text.partition("://")[2])
    is_web = text.startswith(("http://", "https://"))
    if "*" not in text and (is_web or text.endswith(".tar")):
        return [text]
    pattern = text if "*" in text else f"{text.rstrip('/')}/*.tar"
    if not (matching := find_urls(pattern)):
        raise FileNotFoundError(f"no .tar shards at {redact_source(pattern)}")
    return matching


def _list_local_shards(text: str) -> list[Path | str]:
    path = Path(text)
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    if path.is_file():
        return [path]
    if not glob.has_magic(text):
        raise FileNotFoundError(
            f"no shards at {path}: `python -m ldm.prepare` writes them there (out={path})"
        )
    shards = []
    for match in map(Path, sorted(glob.glob(text, recursive=True))):
        shards += sorted(match.glob("*.tar")) if match.is_dir() else [match]
    if not (shards := [shard for shard in shards if shard.suffix == ".tar"]):
        raise FileNotFoundError(f"no .tar shards match {text}")
    return shards
