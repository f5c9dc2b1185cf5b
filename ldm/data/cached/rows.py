"""The bytes of one sample of a batch, a row, and how they are copied out of a cached file.

Shapes: h w latent grid, L tokens, D text width, P pooled width.
"""

import json
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch

from ldm.data.cached.format import DTYPE_BY_NAME, SampleLayout, TensorPart
from ldm.data.cached.manifest import LATENT_PARTS, TEXT_PARTS, CacheError, Manifest


class RowLayout(NamedTuple):
    """Where the parts of a sample lie in its row; numbers: the bytes of floating-point numbers."""

    parts: dict[str, TensorPart]
    numbers: int
    size: int


class CopyPlan(NamedTuple):
    """Pieces (start in the file, its end, start in the row) of a file with this layout.

    numbers: as in `RowLayout`.
    """

    layout: SampleLayout
    pieces: list[tuple[int, int, int]]
    numbers: int


def lay_out_row(manifest: Manifest, grid: tuple[int, int]) -> RowLayout:
    """Returns the layout of a row: the parts in the order of a file, then padding."""
    return _lay_out_row(
        grid,
        manifest.latent_channels,
        manifest.dtype,
        manifest.posterior,
        tuple(manifest.text_parts),
        (manifest.text_width, manifest.max_length, manifest.pooled_width),
    )


@lru_cache
def _lay_out_row(
    grid: tuple[int, int],
    channels: int,
    dtype: str,
    posterior: str,
    text_parts: tuple[str, ...],
    widths: tuple[int, int, int],
) -> RowLayout:
    width, length, pooled = widths
    shapes = dict.fromkeys(("logvar", "mean")[posterior == "mean" :], (channels, *grid))
    text = {"pooled": (pooled,), "tokens": (length, width), "mask": (length,)}
    shapes |= {name: shape for name, shape in text.items() if name in text_parts}
    parts, at, numbers = {}, 0, 0
    for name, shape in shapes.items():
        kind = torch.uint8 if name == "mask" else DTYPE_BY_NAME[dtype]
        parts[name] = TensorPart(kind, shape, at, at + prod(shape) * kind.itemsize)
        at = parts[name].end
        numbers = at if kind.is_floating_point else numbers
    return RowLayout(parts, numbers, -(-at // 4) * 4)


def plan_copy(
    layout: SampleLayout,
    manifest: Manifest,
    *,
    captions: int,
    number: int,
    flip: bool,
    grid: tuple[int, int],
) -> CopyPlan:
    """Returns which bytes of a file go where, for one of its captions.

    CacheError unless the file is as the manifest says, on this grid, of so many captions.
    """
    layout.check(manifest)
    if layout.parts["mean"].shape[1:] != grid:
        raise CacheError(f"has latents of {layout.parts['mean'].shape[1:]}, not {grid}")
    row, pieces = lay_out_row(manifest, grid), []
    for name, cells in row.parts.items():
        stored = f"{name}_flipped" if flip and name in LATENT_PARTS else name
        part, begin = layout.parts[stored], layout.parts[stored].start
        if name in TEXT_PARTS:
            if part.shape[0] != captions:
                raise CacheError(f"has {captions} captions, and states of {part.shape[0]}")
            begin += number * (cells.end - cells.start)
        end, start = begin + cells.end - cells.start, cells.start
        if pieces and pieces[-1][1] == begin:
            begin, _, start = pieces.pop()
        pieces.append((begin, end, start))
    return CopyPlan(layout, pieces, row.numbers)


def parse_cached_record(data: bytes) -> dict[str, Any]:
    """Returns a cached sample's JSON; CacheError unless its captions and sizes are sound."""
    try:
        fields: dict[str, Any] = json.loads(data)
        captions, weights = fields["captions"], fields.get("caption_weights")
        sizes = fields["sizes"]
        sound = type(captions) is list and captions and all(type(one) is str for one in captions)
        sound = sound and len(sizes) == 6 and all(type(n) is int and -1 < n < 2**31 for n in sizes)
        if sound and weights is not None:
            sound = len(weights) == len(captions) and all(0 < one < 2.0**64 for one in weights)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise CacheError("has a json without its captions or sizes")
    return fields
