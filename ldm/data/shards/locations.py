"""What `data.train` names to the shards themselves, in their order."""

import glob
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from braceexpand import UnbalancedBracesError, braceexpand

from ldm.data.shards.remote import RemoteShard, describe_urls, find_urls, redact_url
from ldm.utils.files import resolve_path

ShardSource = str | Path | Sequence[str | Path]
MAX_SHARDS = 1_000_000


def locate_shards(source: ShardSource) -> list[Path | RemoteShard]:
    """The shards of a folder, .tar file, glob, brace range or URL, or of a list of these.

    Folders and globs are in order of name; what is named twice is there twice. Servers are asked
    for the size of each shard.
    Raises FileNotFoundError where there is no shard, ValueError for `pipe:`, for a shard that is a
    pipe or a device, for braces that do not close, for a URL of an unknown kind and for one with a
    password; RemoteError where a server does not answer.
    """
    sources = [source] if isinstance(source, (str, Path)) else source
    sources = [each if is_url(str(each)) else resolve_path(each) for each in sources]
    found = [
        shard
        for text in map(str, sources)
        for one in _expand_braces(text)
        for shard in _list_shards(one)
    ]
    if not found:
        places = (text for text in map(str, sources) if not is_url(text))
        below = sorted({tar.parent for place in places for tar in Path(place).glob("*/*.tar")})
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
    local = (place for place in found if isinstance(place, Path))
    if other := next((path for path in local if not (path.is_file() or path.is_dir())), None):
        raise ValueError(f"{other} is no file, but a pipe, a device or a link to nothing")
    remotes = iter(describe_urls([place for place in found if isinstance(place, str)]))
    return [next(remotes) if isinstance(place, str) else place for place in found]


def redact_source(source: ShardSource) -> str:
    """A source for messages, without credentials."""
    if isinstance(source, (str, Path)):
        return redact_url(str(source)) if is_url(str(source)) else str(source)
    return f"[{', '.join(redact_source(one) for one in source)}]"


def is_url(text: str) -> bool:
    return "://" in text


def _expand_braces(text: str) -> Iterable[str]:
    """`a-{00..02}.tar` is three, as for a shell; a name that exists is taken as it is."""
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
            "files; "
            "~/.netrc (for a web server) or the environment (for s3, gs) is the place for it"
        )
    if "::" in text:
        raise ValueError(f"{redact_source(text)}: '::' joins addresses; give a list of them")
    if text.startswith(("file://", "local://")):
        return _list_local_shards(text.partition("://")[2])
    web = text.startswith(("http://", "https://"))
    if "*" in text or (not web and not text.endswith(".tar")):
        pattern = text if "*" in text else f"{text.rstrip('/')}/*.tar"
        if not (matching := find_urls(pattern)):
            raise FileNotFoundError(f"no .tar shards at {redact_source(pattern)}")
        return matching
    return [text]


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
    matching = [Path(name) for name in sorted(glob.glob(text, recursive=True))]
    shards = [
        shard
        for place in matching
        for shard in (sorted(place.glob("*.tar")) if place.is_dir() else [place])
        if shard.suffix == ".tar"
    ]
    if not shards:
        raise FileNotFoundError(f"no .tar shards match {text}")
    return shards
