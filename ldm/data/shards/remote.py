"""Shards behind URLs: their size and ETag, ranges of their bytes, and whole copies.

fsspec implements the protocols; this file adds retries, and messages without credentials. It does
not import torch, because `ldm.data.shards.prefetch` runs it in a process of its own.
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

MAX_TRIES = 3
RETRY_WAIT = 0.5  # seconds before the second try; four times as long before each further one
STALL_TIMEOUT = 30.0  # seconds without a byte
REMOTE_THREADS = 16

_CHUNK = 8 * 2**20
_SECRET_PARAMETERS = (  # prefixes
    *("x-amz-", "x-goog-", "signature", "sig", "expires", "policy", "key-pair-id", "token"),
    *("awsaccesskeyid", "googleaccessid", "access_token", "st", "se", "sp", "sv", "sr", "skoid"),
)
_ETAG_KEYS = (
    *("ETag", "etag", "md5Hash", "Last-Modified", "LastModified", "last_modified"),
    *("blob_id", "xet_hash"),  # of the hub
)
T = TypeVar("T")


class RemoteError(OSError):
    """A server that did not answer, or answered wrongly, in all tries."""


class UrlError(ValueError):
    """A URL whose protocol is unknown or needs a package that is missing."""


class NoRangesError(Exception):
    """A server that sends whole files only."""


def redact_url(url: str) -> str:
    """Returns the URL without user, password and query."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


@dataclass(frozen=True, repr=False)
class RemoteShard:
    """A shard behind a URL as its server describes it: bytes, and an ETag that changes with it."""

    url: str
    size: int
    etag: str

    def __str__(self) -> str:
        return redact_url(self.url)

    __repr__ = __str__

    @property
    def name(self) -> str:
        """The file name of a copy: one for each address, size and ETag, without credentials."""
        parts = urlsplit(self.url)
        query = [
            (name, value)
            for name, value in parse_qsl(parts.query)
            if not name.lower().startswith(_SECRET_PARAMETERS)
        ]
        digest = hashlib.sha256(f"{self}?{urlencode(query)} {self.etag}".encode()).hexdigest()
        base = PurePosixPath(parts.path).name
        base = "".join(c if c.isalnum() or c in "._-" else "_" for c in base)
        return f"{digest[:16]}-{self.size}-{base[-80:]}"


def describe_urls(urls: Sequence[str]) -> list[RemoteShard]:
    """Asks the servers in parallel; raises FileNotFoundError, RemoteError or UrlError."""
    with ThreadPoolExecutor(REMOTE_THREADS) as pool:
        return list(pool.map(_describe_url, urls))


def find_urls(pattern: str) -> list[str]:
    """Returns the URLs that match a glob, in order of name; raises like `describe_urls`."""
    fs, path = _make_filesystem(pattern)
    if "http" in fs.protocol:
        raise UrlError(
            f"{redact_url(pattern)}: a web server cannot be searched; name its shards with a range "
            "such as train-{0000..0099}.tar"
        )
    return [fs.unstrip_protocol(name) for name in sorted(_retry(lambda: fs.glob(path), pattern))]


def read_range(remote: RemoteShard, start: int, end: int) -> bytes:
    """Returns the bytes [start, end); raises RemoteError, or NoRangesError of such a server."""

    def read() -> bytes:
        fs, path = _make_filesystem(remote.url)
        if "http" in fs.protocol or fs.protocol == "hf":
            # Unlike cat_file, it loads neither a whole file in place of a range nor a block ahead.
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
    """Copies the shard to `part`, continuing an earlier call; RemoteError if it was replaced."""

    def download_whole() -> None:
        fs, path = _make_filesystem(remote.url)
        fs.get_file(path, str(part))
        if part.stat().st_size != remote.size:
            raise EOFError("a body of another size")

    start = part.stat().st_size if part.exists() else 0
    try:
        with open(part, "ab" if start <= remote.size else "wb") as file:
            for at in range(file.tell(), remote.size, _CHUNK):
                file.write(read_range(remote, at, min(at + _CHUNK, remote.size)))
                file.flush()
    except NoRangesError:
        _retry(download_whole, remote.url)
    if _describe_url(remote.url, refresh=True) != remote:
        part.unlink(missing_ok=True)
        raise RemoteError(f"{remote} was replaced on its server since the run began; restart")
    with open(part, "rb") as file:
        os.fsync(file.fileno())


def _describe_url(url: str, *, refresh: bool = False) -> RemoteShard:
    def ask() -> RemoteShard:
        fs, path = _make_filesystem(url)
        if refresh:
            fs.invalidate_cache(path)
        info = fs.info(path)
        if info.get("size") is None:
            raise RemoteError("its server does not say how large it is")
        etag = next((str(info[key]) for key in _ETAG_KEYS if info.get(key)), "")
        return RemoteShard(url, int(info["size"]), etag)

    return _retry(ask, url)


def _make_filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Made for each use: fsspec caches them, and they do not survive a fork."""
    protocol = url.partition("://")[0]
    options = {}
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=STALL_TIMEOUT, sock_read=STALL_TIMEOUT)
        # trust_env: proxies of the environment, and passwords of ~/.netrc.
        options = {"client_kwargs": {"timeout": timeout, "trust_env": True}}
    try:
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        missing = getattr(error.__cause__, "name", None)
        remedy = f"pip install {missing}" if missing else str(error)
        raise UrlError(
            f"{redact_url(url)}: {protocol}:// needs a further package: {remedy}"
        ) from None
    except ValueError:
        raise UrlError(f"{redact_url(url)}: no protocol called {protocol}:// is known") from None


def _retry(action: Callable[[], T], url: str) -> T:
    """Calls `action`, again after transient errors. Errors do not show credentials."""
    for attempt in range(MAX_TRIES):
        try:
            return action()
        except (NoRangesError, RemoteError, UrlError):
            raise
        except Exception as error:  # each protocol raises its own kinds
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            cause = error if error.__cause__ is None else error.__cause__
            response = getattr(cause, "response", None)  # of the hub
            status = getattr(response, "status_code", None) or getattr(cause, "status", None)
            if isinstance(status, int):
                is_transient = status >= 500 or status in (408, 425, 429)
            else:
                final = (FileNotFoundError, PermissionError, ValueError)
                status, is_transient = None, not isinstance(cause, final)
            reason = f"HTTP {status}" if status else type(cause).__name__
            if response is not None and (code := response.headers.get("X-Error-Code")):
                reason += f" {code}"
        if not is_transient:
            break
        if attempt < MAX_TRIES - 1:
            time.sleep(RETRY_WAIT * 4**attempt * random.uniform(0.75, 1.25))
    if status in (404, 410) or reason == "FileNotFoundError":
        raise FileNotFoundError(f"no shard at {redact_url(url)} ({reason})") from None
    tries = f"tried {attempt + 1} times" if is_transient else "not worth another try"
    if status in (401, 403) and url.startswith("hf://"):
        tries = "private, gated or missing: set HF_TOKEN, and accept the terms on its page if any"
    if reason == "OfflineModeIsEnabled":
        tries = "HF_HUB_OFFLINE is set"
    raise RemoteError(f"{redact_url(url)} could not be read: {reason} ({tries})") from None
