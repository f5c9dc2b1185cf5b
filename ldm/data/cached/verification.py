"""Reads all of a cache again: digests, members, layouts, values, records."""

import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.data.cached.format import (
    MAX_SAMPLE_BYTES,
    RECORD_SUFFIX,
    TENSOR_SUFFIX,
    check_finite,
    unpack_null,
    unpack_sample,
)
from ldm.data.cached.manifest import LATENT_PARTS, NULL_NAME, CacheError, Manifest
from ldm.data.shards.tar_headers import split_member_name
from ldm.utils.files import read_regular_file
from ldm.utils.hashing import hash_file

# Gets the shard's name, the key, the tensors and the record of each sound sample.
SampleVisitor = Callable[[str, str, dict[str, Tensor], dict[str, Any]], object]


def find_cache_problems(folder: Path, manifest: Manifest, visit: SampleVisitor) -> Iterator[str]:
    """Yields a line for each problem of a complete cache; `visit` sees each sound sample."""
    if manifest.text_parts:
        try:
            null = read_regular_file(folder / NULL_NAME, max_bytes=MAX_SAMPLE_BYTES)
            unpack_null(null, manifest)
        except (OSError, ValueError) as error:
            yield f"{folder / NULL_NAME} {error}"
    others = {path.stem for path in folder.glob("*.tar")} - manifest.shards.keys()
    for name in sorted(others):
        yield f"{folder / name}.tar is no shard of this cache"
    count = 0
    for name, digest in manifest.shards.items():
        path = folder / f"{name}.tar"
        try:
            if hash_file(path) != digest:
                yield f"{path} is not what was written (its digest differs)"
            for key, members in _read_samples(path):
                count += 1
                try:
                    tensors, record = check_sample(members, manifest)
                except CacheError as error:
                    yield f"{path}: sample '{key}' {error}"
                else:
                    visit(name, key, tensors, record)
        except (OSError, tarfile.TarError) as error:
            yield f"{path} cannot be read: {error}"
    if count != manifest.samples:
        yield f"{folder} has {count} samples, where its manifest says {manifest.samples}"


def _read_samples(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    key, members = "", {}
    with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # they need not stay in memory
            parts = split_member_name(member.name)
            if not member.isreg() or parts is None or member.size > MAX_SAMPLE_BYTES:
                raise tarfile.ReadError(f"the member '{member.name}' is none of a cache")
            if members and parts[0] != key:
                yield key, members
                members = {}
            key = parts[0]
            members[parts[1]] = tar.extractfile(member).read()
    if members:
        yield key, members


def check_sample(
    members: Mapping[str, bytes], manifest: Manifest
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns tensors and record of a sample's members; CacheError says what is wrong with them."""
    if members.keys() != {TENSOR_SUFFIX, RECORD_SUFFIX}:
        raise CacheError(f"has the members {sorted(members)}")
    tensors = unpack_sample(bytearray(members[TENSOR_SUFFIX]), manifest)
    check_finite(tensors)
    try:
        record = json.loads(members[RECORD_SUFFIX])
        captions, digest, size = (record[name] for name in ("captions", "digest", "image_size"))
        is_text = all(isinstance(text, str) for text in captions) and len(captions) > 0
        is_sound = is_text and re.fullmatch("[0-9a-f]{64}", digest) is not None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CacheError(f"has a damaged record ({error!r})") from error
    if not is_sound:
        raise CacheError("has a record without captions or digest")
    for name, tensor in tensors.items():
        if name not in LATENT_PARTS and len(tensor) != len(captions):
            raise CacheError(f"has {name} of {len(tensor)} captions, and {len(captions)} captions")
    height, width = (side * manifest.factor for side in tensors["mean"].shape[1:])
    if size != [width, height]:
        raise CacheError(f"has image_size {size} with latents of {[width, height]}")
    return tensors, record
