"""Tables of features of many images, computed batch by batch, by one process or several."""

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ldm.evaluation.distributed import ProcessGroup
from ldm.evaluation.tensor_cache import DamagedTensorFileError, read_tensor_file, write_tensor_file

FeatureRows = Mapping[str, Tensor]
IMAGE_ROWS = "/images"  # the key of a piece's images; no network has such a name


def tabulate(
    count: int,
    make: Callable[[range], FeatureRows],
    *,
    columns: Mapping[str, int],
    batch: int,
    folder: Path | None = None,
    done: Callable[[range], None] = lambda items: None,
    on_images: Callable[[range, Tensor], None] | None = None,
) -> dict[str, Tensor]:
    """Returns float32 tables (count, D) on the CPU, one for each name and D of `columns`.

    `make(items)` returns the rows (len(items), D) of up to `batch` consecutive items. Processes
    take such pieces in turns, and all get the same tables. Pieces are saved in `folder` and read
    from there; a damaged piece is made again with a warning. `done(items)` is called equally often
    in each process. on_images(items, images): called before it with a piece's images, uint8, which
    `make` then returns as well, as `IMAGE_ROWS`.
    """
    if batch < 1:
        raise ValueError(f"batch={batch} must be 1 or more")
    ranks = ProcessGroup()
    tables = {name: torch.zeros(count, width) for name, width in columns.items()}
    for number in range(math.ceil(count / batch / ranks.world_size)):
        first = min((number * ranks.world_size + ranks.rank) * batch, count)
        items = range(first, min(first + batch, count))
        images = torch.empty(0, dtype=torch.uint8)
        if items:
            rows = dict(_load_piece(items, make, columns, folder, images=on_images is not None))
            images = rows.pop(IMAGE_ROWS, images)
            for name, part in rows.items():
                tables[name][items.start : items.stop] = part
        if on_images is not None:
            on_images(items, images)
        done(items)
    return {name: ranks.sum(table) for name, table in tables.items()}


def _load_piece(
    items: range,
    make: Callable[[range], FeatureRows],
    columns: Mapping[str, int],
    folder: Path | None,
    *,
    images: bool,
) -> FeatureRows:
    facts = {"items": [items.start, items.stop]}
    path = None if folder is None else folder / f"{items.start:07d}-{items.stop:07d}.safetensors"
    if path is not None and path.is_file():
        try:
            rows, saved = read_tensor_file(path)
            if (problem := _find_problem(rows, items, columns, images)) or saved != facts:
                raise DamagedTensorFileError(f"{path} is of something else ({problem or saved})")
            return rows
        except DamagedTensorFileError as error:
            warnings.warn(f"{error}: it is made again", stacklevel=3)
    rows = {
        name: (part if name == IMAGE_ROWS else part.float()).detach().cpu()
        for name, part in make(items).items()
    }
    if problem := _find_problem(rows, items, columns, images):
        raise ValueError(f"of items {items.start} to {items.stop - 1}, {problem}")
    if path is not None:
        try:
            write_tensor_file(path, rows, facts=facts)
        except OSError as error:  # a full disk: the piece would only have saved time
            warnings.warn(f"{path} cannot be written: {error.strerror or error}", stacklevel=3)
    return rows


def _find_problem(
    rows: FeatureRows, items: range, columns: Mapping[str, int], images: bool
) -> str | None:
    """Returns how the rows of some items differ from what they must be; None if they do not."""
    if images:
        rows = dict(rows)
        pixels = rows.pop(IMAGE_ROWS, None)
        if pixels is None or pixels.dtype != torch.uint8 or len(pixels) != len(items):
            return f"there are no {len(items)} images"
    if rows.keys() != columns.keys():
        return f"there are tables {sorted(rows)} for {sorted(columns)}"
    for name, width in columns.items():
        shape, kind = tuple(rows[name].shape), rows[name].dtype
        if shape != (len(items), width) or kind != torch.float32:
            return f"{name} is {kind} {shape} for {torch.float32} {(len(items), width)}"
        if not rows[name].isfinite().all():
            return f"{name} holds NaN or infinity"
    return None
