"""Shards behind URLs: what a server tells of them, ranges of their bytes, and whole copies.

fsspec knows the protocols; here are patience, and messages without credentials. Nothing in this
file needs torch: `ldm.data.shards.prefetch` runs it in a process of its own.
"""

import errno
import hashlib
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import fsspec
from fsspec.registry import known_implementations

MAX_TRIES = 3
RETRY_WAIT = 0.5  # seconds before the second try; four times as long before each further one
STALL_TIMEOUT = 30.0  # seconds without a byte
REMOTE_THREADS = 16

_CHUNK = 8 * 2**20
_SECRET_PARAMETERS = (
    "x-amz-",
    "x-goog-",
    "signature",
    "sig",
    "expires",
    "policy",
    "key-pair-id",
    "token",
)
_SECRET_PARAMETERS += (
    "awsaccesskeyid",
    "googleaccessid",
    "access_token",
    "st",
    "se",
    "sp",
    "sv",
    "sr",
    "skoid",
)
T = TypeVar("T")


class RemoteError(OSError):
    """A server that did not answer, or not rightly, each time it was asked."""


class UrlError(ValueError):
    """A URL of a kind that is not known, or that a missing package would know."""


class NoRangesError(Exception):
    """A server that gives a file as a whole only."""


def redact_url(url: str) -> str:
    """The URL without user, password and query, as it may be shown and logged."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


@dataclass(frozen=True, repr=False)
class RemoteShard:
    """A shard behind a URL, as its server described it: bytes, and a mark that changes with it."""

    url: str
    size: int
    etag: str

    def __str__(self) -> str:
        return redact_url(self.url)

    __repr__ = __str__

    @property
    def name(self) -> str:
        """A file name for a copy: another one for another address, size or mark.

        It is the same for any credentials, with which URLs are signed anew each day.
        """
        parts = urlsplit(self.url)
        query = [
            pair
            for pair in parse_qsl(parts.query)
            if not pair[0].lower().startswith(_SECRET_PARAMETERS)
        ]
        digest = hashlib.sha256(f"{self}?{urlencode(query)} {self.etag}".encode()).hexdigest()
        base = "".join(
            c if c.isalnum() or c in "._-" else "_" for c in PurePosixPath(parts.path).name
        )
        return f"{digest[:16]}-{self.size}-{base[-80:]}"


def describe_urls(urls: Sequence[str]) -> list[RemoteShard]:
    """What the servers say about these files, asked side by side.

    Raises FileNotFoundError, RemoteError, UrlError.
    """
    with ThreadPoolExecutor(REMOTE_THREADS) as pool:
        return list(pool.map(_describe_url, urls))


def find_urls(pattern: str) -> list[str]:
    """The URLs that match a glob, in order of name; RemoteError as `describe`."""
    fs, path = _make_filesystem(pattern)
    if "http" in fs.protocol:
        raise UrlError(
            f"{redact_url(pattern)}: a web server cannot be searched; name its shards with a range "
            "such as train-{0000..0099}.tar"
        )
    return [fs.unstrip_protocol(name) for name in sorted(_retry(lambda: fs.glob(path), pattern))]


def read_range(remote: RemoteShard, start: int, end: int) -> bytes:
    """The bytes [start, end) with 0 <= start < end <= size.

    Raises RemoteError after `TRIES` tries, NoRangesError where the server knows no ranges.
    """

    def read() -> bytes:
        fs, path = _make_filesystem(remote.url)
        if "http" in fs.protocol:
            # Unlike cat_file, it does not take in a whole file that it was sent in place of a part.
            with fs.open(path, block_size=_CHUNK, cache_type="none", size=remote.size) as file:
                try:
                    file.seek(start)
                    data = file.read(end - start)
                except ValueError as error:
                    raise NoRangesError(str(remote)) from error
        else:
            data = fs.cat_file(path, start=start, end=end)
        if len(data) != end - start:
            raise EOFError(f"{len(data)} bytes in place of {end - start}")
        return data

    return _retry(read, remote.url)


def download_shard(remote: RemoteShard, part: Path) -> None:
    """Copy the shard to `part`, going on where an earlier call left off.

    Raises RemoteError also where what came is not what was described.
    """
    have = part.stat().st_size if part.exists() else 0
    try:
        with open(part, "ab" if have <= remote.size else "wb") as file:
            for start in range(file.tell(), remote.size, _CHUNK):
                file.write(read_range(remote, start, min(start + _CHUNK, remote.size)))
                file.flush()
    except NoRangesError:

        def whole() -> None:
            fs, path = _make_filesystem(remote.url)
            fs.get_file(path, str(part))
            if part.stat().st_size != remote.size:
                raise EOFError("a body of another size")

        _retry(whole, remote.url)
    now = _describe_url(remote.url)
    if now != remote:
        part.unlink(missing_ok=True)
        raise RemoteError(f"{remote} was replaced on its server since the run began; restart")
    with open(part, "rb") as file:
        os.fsync(file.fileno())


def _describe_url(url: str) -> RemoteShard:
    def ask() -> RemoteShard:
        fs, path = _make_filesystem(url)
        info = fs.info(path)
        if info.get("size") is None:
            raise RemoteError("its server does not say how large it is")
        marks = ("ETag", "etag", "md5Hash", "Last-Modified", "LastModified", "last_modified")
        etag = next((str(info[mark]) for mark in marks if info.get(mark)), "")
        return RemoteShard(url, int(info["size"]), etag)

    return _retry(ask, url)


def _make_filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Made anew for each use, since fsspec's file systems do not survive a fork (it caches)."""
    protocol = url.partition("://")[0]
    options = {}
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=STALL_TIMEOUT, sock_read=STALL_TIMEOUT)
        # The environment: proxies, and ~/.netrc, where passwords are better kept than in a URL.
        options = {"client_kwargs": {"timeout": timeout, "trust_env": True}}
    try:
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        hint = known_implementations.get(protocol, {}).get("err", str(error))
        raise UrlError(
            f"{redact_url(url)}: {protocol}:// needs a further package. {hint}"
        ) from None
    except ValueError:
        raise UrlError(f"{redact_url(url)}: no protocol called {protocol}:// is known") from None


def _retry(action: Callable[[], T], url: str) -> T:
    """What `action` gives, tried again after what may pass. Errors do not show credentials."""
    for attempt in range(MAX_TRIES):
        try:
            return action()
        except (NoRangesError, RemoteError, UrlError):
            raise
        except Exception as error:  # each protocol has kinds of its own
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            status, passing = _find_http_status(error), _is_transient(error)
            told = f"HTTP {status}" if status else type(_find_cause(error)).__name__
        if not passing:
            break
        if attempt < MAX_TRIES - 1:
            time.sleep(RETRY_WAIT * 4**attempt * random.uniform(0.75, 1.25))
    if status in (404, 410) or told == "FileNotFoundError":
        raise FileNotFoundError(f"no shard at {redact_url(url)} ({told})") from None
    tries = f"tried {attempt + 1} times" if passing else "not worth another try"
    raise RemoteError(f"{redact_url(url)} could not be read: {told} ({tries})") from None


def _find_cause(error: BaseException) -> BaseException:
    return error.__cause__ if error.__cause__ is not None else error


def _find_http_status(error: BaseException) -> int | None:
    status = getattr(_find_cause(error), "status", None)
    return status if isinstance(status, int) else None


def _is_transient(error: BaseException) -> bool:
    """Whether another try may help."""
    status = _find_http_status(error)
    if status is not None:
        return status >= 500 or status in (408, 425, 429)
    return not isinstance(_find_cause(error), (FileNotFoundError, PermissionError, ValueError))
