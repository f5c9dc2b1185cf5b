"""Copies of shards whose samples have more keys in their json.

out/NAME.tar          the members of the shard NAME.tar, in order; json members have more keys
out/NAME_stats.json   its number of samples and the digest of the tar: the copy is whole
"""

import io
import itertools
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ldm.data.captions import parse_json_object
from ldm.data.shards.tar_headers import split_member_name
from ldm.utils.errors import UsageError
from ldm.utils.files import read_json, replace_file, write_json
from ldm.utils.hashing import hash_file

SampleFields = Mapping[str, Mapping[str, Any]]  # what the json of a sample gets, by its key


def check_shard_names(paths: Sequence[Path]) -> None:
    """Raises UsageError for two shards of one name."""
    names: dict[str, Path] = {}
    for path in paths:
        if (other := names.setdefault(path.name, path)) != path:
            raise UsageError(f"{other} and {path} have one name, and so would their copies")


def copy_shard(path: Path, out: Path, fields: SampleFields) -> None:
    """Writes a copy of a shard to the folder `out`, unless it is there."""
    if is_copied(path, out):
        return
    target = out / path.name
    with replace_file(target) as file:
        _copy_members(path, file, fields)
    write_json(_name_stats(path, out), {"count": len(fields), "sha256": hash_file(target)})


def is_copied(path: Path, out: Path) -> bool:
    """Whether the folder `out` has a whole copy of a shard."""
    try:
        return read_json(_name_stats(path, out))["sha256"] == hash_file(out / path.name)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _name_stats(path: Path, out: Path) -> Path:
    return out / f"{path.stem}_stats.json"


def _copy_members(path: Path, file: BinaryIO, fields: SampleFields) -> None:
    """Copies all members; a sample without a json gets one after its last member."""
    names = {"encoding": "utf-8", "errors": "surrogateescape"}
    with (
        tarfile.open(path, **names) as source,
        tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, **names) as target,
    ):

        def write_json_member(key: str, name: str, like: tarfile.TarInfo, record: bytes) -> None:
            data = json.dumps(parse_json_object(record) | dict(fields[key])).encode()
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.mode = len(data), like.mtime, like.mode
            target.addfile(member, io.BytesIO(data))

        for key, neighbours in itertools.groupby(_iterate_members(source), key=_get_key):
            lacks_json = key in fields
            for member in neighbours:
                content = source.extractfile(member) if member.isreg() else None
                if lacks_json and content and member.name.lower().endswith(".json"):
                    write_json_member(key, member.name, member, content.read())
                    lacks_json = False
                else:
                    target.addfile(member, content)
            if lacks_json:
                write_json_member(key, f"{key}.json", member, b"")


def _iterate_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members.clear()  # a million headers need not stay in memory
        yield member


def _get_key(member: tarfile.TarInfo) -> str | None:
    return (split_member_name(member.name) or (None,))[0]
