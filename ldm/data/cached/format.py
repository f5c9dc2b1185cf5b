"""The samples of a cache: packed as safetensors and JSON, and read without running anything.

A sample has two members. KEY.safetensors: mean and logvar (C, h, w), the same with `_flipped`,
tokens (n, L, D), mask (n, L) uint8, pooled (n, P), as far as the manifest names them, for n
captions. KEY.json: the source's fields, and those of `pack_record`.

A safetensors file is a header's length (8 bytes), the header (JSON), and the raw data. All samples
of one size have the same header, so its parse is cached by its bytes.
"""

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.data.cached.manifest import LATENT_PARTS, TEXT_PARTS, CacheError, Manifest

TENSOR_SUFFIX, RECORD_SUFFIX = "safetensors", "json"
MAX_LAYOUT_BYTES = 2**14  # of a header: ours have some 600 bytes
MAX_SAMPLE_BYTES = 2**30
DTYPE_BY_NAME = {"bf16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_DIMS = dict.fromkeys(LATENT_PARTS, 3) | {"tokens": 3, "mask": 2, "pooled": 2}


class TensorPart(NamedTuple):
    """One tensor of a sample: start and end are bytes of its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class SampleLayout(NamedTuple):
    """Where the tensors of a sample lie; header_size: the bytes before them, size: of all.

    stamp: `Manifest.stamp` of its cache, None in a cache of before.
    """

    parts: dict[str, TensorPart]
    header_size: int
    size: int
    stamp: str | None

    def check(self, manifest: Manifest) -> None:
        """Raises CacheError unless the tensors are those that the manifest promises."""
        if self.stamp not in (None, manifest.stamp):
            raise CacheError("is of another cache, of other encoders or settings")
        names, parts = set(manifest.part_names), self.parts
        if names != parts.keys():
            missing, more = sorted(names - parts.keys()), sorted(parts.keys() - names)
            raise CacheError(f"has the tensors {more} too many, {missing} too few")
        dtype, factor = DTYPE_BY_NAME[manifest.dtype], manifest.factor
        grids = {(height // factor, width // factor) for width, height in manifest.image_sizes}
        mean = parts["mean"].shape
        if mean[0] != manifest.latent_channels or mean[1:] not in grids:
            raise CacheError(f"has latents of the shape {mean}, which the cache does not have")
        captions = {parts[name].shape[0] for name in manifest.text_parts}
        widths = {
            "tokens": (manifest.max_length, manifest.text_width),
            "mask": (manifest.max_length,),
            "pooled": (manifest.pooled_width,),
        }
        for name, part in parts.items():
            right = torch.uint8 if name == "mask" else dtype
            shape = mean if name in LATENT_PARTS else (*captions, *widths[name])
            if part.dtype != right or part.shape != shape:
                raise CacheError(f"has {name} as {part.dtype} {part.shape}, not {right} {shape}")
        most = manifest.captions if isinstance(manifest.captions, int) else math.inf
        if captions and not 1 <= min(captions) <= most:
            raise CacheError(f"has the text states of {min(captions)} captions")


def pack_sample(
    tensors: Mapping[str, Tensor], record: Mapping[str, Any], *, stamp: str | None = None
) -> dict[str, bytes]:
    """Returns the members of a sample of the cache with this stamp by suffix."""
    file = pack_tensors(tensors, stamp=stamp)
    return {TENSOR_SUFFIX: file, RECORD_SUFFIX: json.dumps(record).encode()}


def pack_tensors(tensors: Mapping[str, Tensor], *, stamp: str | None = None) -> bytes:
    """Returns tensors of the CPU as a file, the same bytes as by safetensors, but sooner."""
    # safetensors' order: the wider types first.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    described = tuple((name, tensors[name].dtype, tuple(tensors[name].shape)) for name in names)
    raw = (tensors[name].contiguous().flatten().view(torch.uint8).numpy() for name in names)
    return b"".join([_pack_header(described, stamp), *raw])


@lru_cache(maxsize=1024)
def _pack_header(
    described: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...], stamp: str | None
) -> bytes:
    header, at = {"__metadata__": {"cache": stamp}} if stamp else {}, 0
    for name, dtype, shape in described:
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def pack_record(
    fields: Mapping[str, Any],
    *,
    captions: Sequence[str],
    weights: Sequence[float] | None,
    digest: str,
    sizes: Sequence[int],
) -> dict[str, Any]:
    """Returns the JSON of a sample: the source's fields, and what the cache says of it.

    captions, weights: as `ShardReader.read` lists them; digest: the SHA-256 of the source's image
    file; sizes: `Condition.sizes` of the image that was encoded.
    """
    record = {**fields, "captions": list(captions), "digest": digest}
    record |= {"image_size": [sizes[5], sizes[4]], "sizes": list(sizes)}
    if weights is not None:
        record["caption_weights"] = list(weights)
    return record


@lru_cache(maxsize=1024)
def parse_layout(head: bytes) -> SampleLayout:
    """Returns the layout that a file's first bytes, its header and no more, describe.

    Raises CacheError unless the tensors are of known names and lie one after another.
    """
    try:
        described = json.loads(head[8:])
        stamp = described.pop("__metadata__", {}).get("cache")
        parts = {name: _parse_part(name, value) for name, value in described.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CacheError(f"is no safetensors file of a cache ({type(error).__name__})") from error
    at = 0
    for name, part in sorted(parts.items(), key=lambda item: item[1].start):
        length = math.prod(part.shape) * part.dtype.itemsize
        if part.start != at or part.end - part.start != length:
            raise CacheError(f"has {name} at bytes {part.start} to {part.end}, where it is not")
        at = part.end
    if not 0 < at <= MAX_SAMPLE_BYTES:
        raise CacheError(f"has {at} bytes of tensors")
    moved = {
        name: part._replace(start=part.start + len(head), end=part.end + len(head))
        for name, part in parts.items()
    }
    return SampleLayout(moved, len(head), len(head) + at, stamp)


def _parse_part(name: str, value: Mapping[str, Any]) -> TensorPart:
    dtype, shape, (start, end) = _DTYPES[value["dtype"]], value["shape"], value["data_offsets"]
    numbers = [*shape, start, end]
    if len(shape) != _DIMS[name] or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(name)
    return TensorPart(dtype, tuple(shape), start, end)


def read_layout(data: bytes | memoryview) -> SampleLayout:
    """Returns the layout of a file of which `data` is all, or at least the header."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 0 < length <= MAX_LAYOUT_BYTES:
        raise CacheError("is no safetensors file of a cache (its header has no right length)")
    if len(data) < 8 + length:
        raise CacheError("was cut short")
    return parse_layout(bytes(data[: 8 + length]))


def unpack_sample(
    data: bytes | bytearray | memoryview, manifest: Manifest | None = None
) -> dict[str, Tensor]:
    """Returns the tensors of a whole file as views of `data`, which must not be written to.

    Raises CacheError for anything but a file of `pack_sample`, of this manifest if it is given.
    Values are not looked at, see `check_finite`.
    """
    layout = read_layout(data)
    if len(data) != layout.size:
        raise CacheError(f"has {len(data)} bytes, where its header says {layout.size}")
    if manifest is not None:
        layout.check(manifest)
    return {
        name: torch.frombuffer(
            data, dtype=part.dtype, count=math.prod(part.shape), offset=part.start
        ).view(part.shape)
        for name, part in layout.parts.items()
    }


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises CacheError if a tensor has a value that is NaN or infinite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CacheError(f"has NaN or infinity in {name}")


def unpack_null(data: bytes | bytearray, manifest: Manifest) -> dict[str, Tensor]:
    """Returns the parts of the null condition, each (1, ..), of null.safetensors."""
    if not manifest.text_parts:
        return {}
    layout, tensors = read_layout(data), unpack_sample(bytearray(data))
    if layout.stamp not in (None, manifest.stamp):
        raise CacheError("is of another cache, of other encoders or settings")
    if set(tensors) != set(manifest.text_parts) or not set(tensors) <= set(TEXT_PARTS):
        raise CacheError(f"has {sorted(tensors)}, where the cache has {manifest.text_parts}")
    widths = manifest.max_length, manifest.text_width, manifest.pooled_width
    shapes = {"tokens": (1, *widths[:2]), "mask": (1, *widths[:1]), "pooled": (1, *widths[2:])}
    for name, tensor in tensors.items():
        right = torch.uint8 if name == "mask" else DTYPE_BY_NAME[manifest.dtype]
        if (tensor.dtype, *tensor.shape) != (right, *shapes[name]):
            raise CacheError(f"has {name} as {tensor.dtype} {tuple(tensor.shape)}")
    check_finite(tensors)
    return tensors
