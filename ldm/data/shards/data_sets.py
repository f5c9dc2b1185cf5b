"""Several data sets in one run: `data.train=[{path, weight, size}, ...]`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ldm.data.shards.locations import ShardSource

MIN_WEIGHT, MAX_WEIGHT = 1e-4, 1e4  # an order looks at each pass over a data set


@dataclass(frozen=True)
class WeightedDataSet:
    """A data set of which an epoch takes `weight` times its samples.

    path: see `locate_shards`; size: side in pixels, or None for that of the run.
    """

    path: ShardSource
    weight: float = 1.0
    size: int | None = None

    def __post_init__(self) -> None:
        is_number = isinstance(self.weight, int | float) and not isinstance(self.weight, bool)
        if not is_number or not 0 < self.weight < math.inf:
            raise ValueError(f"{self.path}: the weight is a number above 0, got {self.weight!r}")
        if not MIN_WEIGHT <= self.weight <= MAX_WEIGHT:
            raise ValueError(
                f"{self.path}: the weight is {MIN_WEIGHT:g} to {MAX_WEIGHT:g}, got {self.weight!r}"
                "; weights count against each other, so change those of the other data sets"
            )
        if self.size is not None and (type(self.size) is not int or self.size < 1):
            raise ValueError(f"{self.path}: the size is a side in pixels, got {self.size!r}")


def list_data_sets(source: Any) -> list[WeightedDataSet]:
    """Returns the data sets of a source, or none if it is made of plain locations.

    ValueError for what is no data set.
    """
    entries = [source] if isinstance(source, Mapping) else source
    if isinstance(entries, (str, Path)) or not any(isinstance(one, Mapping) for one in entries):
        return []
    return [_read_data_set(one) for one in entries]


def list_locations(source: Any) -> list[str | Path]:
    """Returns the locations of a source one after another, of all data sets."""
    if isinstance(source, (str, Path)):
        return [source]
    if data_sets := list_data_sets(source):
        return [place for one in data_sets for place in list_locations(one.path)]
    return list(source)


def _read_data_set(entry: Any) -> WeightedDataSet:
    if isinstance(entry, (str, Path)):
        return WeightedDataSet(entry)
    names = [field.name for field in fields(WeightedDataSet)]
    path = entry.get("path") if isinstance(entry, Mapping) else None
    paths = path if isinstance(path, Sequence) and not isinstance(path, str) else [path]
    if not all(isinstance(one, (str, Path)) for one in paths) or not entry.keys() <= set(names):
        raise ValueError(
            "a data set is a location, or a mapping of path, weight and size, such as "
            f"'{{path: DIR, weight: 0.5}}': got {entry}"
        )
    return WeightedDataSet(**entry)
