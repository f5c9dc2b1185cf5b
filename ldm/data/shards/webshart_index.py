"""Reads the index that webshart writes of a tar shard: the file x.json next to x.tar.

    {"filesize": 10240, "files": {"a.png": {"offset": 512, "length": 77, "json_path": "a.json",
                                            "width": 640, "height": 480,
                                            "json_metadata": {"caption": ".."}}, "a.json": {..}}}

It spares the scan of a shard on a server, which takes a request for each large image.
"""

import io
import json
import logging
import tarfile
from collections.abc import Iterator, Sequence
from io import FileIO, IOBase
from pathlib import Path
from typing import Any

from ldm.data.captions import read_sample_captions
from ldm.data.image_decoding import MAX_IMAGE_PIXELS
from ldm.data.shards.remote import NoRangesError, RemoteShard, describe_urls, read_range
from ldm.data.shards.tar_headers import (
    MAX_PADDING,
    MAX_TEXT_BYTES,
    UNMEASURED,
    RemoteFile,
    ShardScan,
    TarMember,
    group_members,
    split_member_name,
)
from ldm.utils.files import read_regular_file

MAX_INDEX_BYTES = 2**28
_INVALID = (OSError, ValueError, LookupError, TypeError, RecursionError)
_log = logging.getLogger(__name__)


def scan_webshart_index(path: Path | RemoteShard, keys: Sequence[str] = ()) -> ShardScan | None:
    """Returns what `scan_tar` finds in a shard, by its index alone; None without a valid one."""
    try:
        if (data := _read_index(path)) is None:
            return None
        with RemoteFile(path) if isinstance(path, RemoteShard) else FileIO(path) as file:
            files = _check_files(json.loads(data), file)
            return group_members(_iterate_members(files, file), keys)
    except (NoRangesError, tarfile.TarError, *_INVALID) as error:
        _log.info("%s has no valid index of webshart next to it: %s", path, error)
        return None


def _read_index(path: Path | RemoteShard) -> bytes | None:
    if not isinstance(path, RemoteShard):
        file = path.with_suffix(".json")
        return read_regular_file(file, max_bytes=MAX_INDEX_BYTES) if file.is_file() else None
    if not path.url.endswith(".tar"):
        return None
    try:
        [remote] = describe_urls([f"{path.url.removesuffix('.tar')}.json"])
    except FileNotFoundError:
        return None
    if not 0 < remote.size <= MAX_INDEX_BYTES:
        raise ValueError(f"{remote} has {remote.size} bytes")
    return read_range(remote, 0, remote.size)


def _check_files(index: Any, file: IOBase) -> dict[str, dict[str, Any]]:
    """Returns the members by name, in order of place; ValueError unless they fill the shard.

    Links, folders, sparse members, long names and second members of a name leave gaps.
    """
    files = index["files"]
    named = files.items() if isinstance(files, dict) else ((one["path"], one) for one in files)
    found = dict(sorted(named, key=lambda item: item[1]["offset"]))
    block, end, size = tarfile.BLOCKSIZE, 0, file.seek(0, io.SEEK_END)
    if index["filesize"] != size:
        raise ValueError(f"it is of a shard of {index['filesize']} bytes, not {size}")
    for name, one in found.items():
        if one["offset"] != end + block or "\ufffd" in name or one["length"] < 0:
            raise ValueError(f"'{name}' does not follow what is before it")
        end = one["offset"] + -(-one["length"] // block) * block
    file.seek(end)
    if size - end > MAX_PADDING or file.read(2 * block) != bytes(2 * block):
        raise ValueError(f"its members end at byte {end}, where the shard does not")
    names = list(found)
    for name in {names[0], names[len(names) // 2], names[-1]}:
        file.seek(found[name]["offset"] - block)
        header = tarfile.TarInfo.frombuf(file.read(block), "utf-8", "surrogateescape")
        if (header.name, header.size) != (name, found[name]["length"]) or not header.isreg():
            raise ValueError(f"the shard has another member in the place of '{name}'")
    return found


def _iterate_members(files: dict[str, dict[str, Any]], file: IOBase) -> Iterator[TarMember]:
    """Yields the members; a text that is not in the index is read, if its sample needs it."""
    records, texts = {}, {}
    for name, one in files.items():
        key, _ = split_member_name(name) or (None, None)
        if "json_path" not in one and isinstance(one.get("captions"), str):
            texts[key] = one["captions"].encode("utf-8", "replace")
        elif "json_path" in one and "json_metadata" in one:
            records[key] = json.dumps(one["json_metadata"]).encode()
    for name, one in files.items():
        if (parts := split_member_name(name)) is None:
            continue
        (key, suffix), text = parts, None
        record = records.get(key)
        if suffix == "json" or (suffix == "txt" and read_sample_captions(None, record) == [""]):
            text = record if suffix == "json" else texts.get(key)
            if text is None and one["length"] <= MAX_TEXT_BYTES:
                file.seek(one["offset"])
                text = file.read(one["length"])
        place = (one["offset"], one["length"])
        yield TarMember(key, suffix, *place, text, False, _read_geometry(one))


def _read_geometry(one: dict[str, Any]) -> tuple[int, int]:
    """Returns (width, height) as webshart found them, before an EXIF orientation."""
    sides = (one.get("width"), one.get("height"))
    if not all(type(side) is int and 0 < side <= MAX_IMAGE_PIXELS for side in sides):
        return UNMEASURED
    return sides
