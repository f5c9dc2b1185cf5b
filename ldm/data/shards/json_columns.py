"""Values of the samples' json, as one numpy array for each key that a filter reads.

N samples. A column has float64 numbers (true is 1, NaN is a missing value) or texts ("" is one):
whichever of the two more of its values are. The values of the other kind count as missing.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ldm.data.captions import parse_json_object

MAX_COLUMN_TEXT = 100  # characters; a longer text is missing: it is a caption and no category
_MAX_KNOWN_KEYS = 256


class JsonColumns(NamedTuple):
    """numbers, texts: the values (N,) of each key by kind; known: names of keys that exist."""

    numbers: dict[str, np.ndarray]
    texts: dict[str, np.ndarray]
    known: list[str]


def tabulate_records(records: Iterable[bytes | None], keys: Sequence[str]) -> JsonColumns:
    """Returns the values of some keys in the json of N samples."""
    rows, known = [], {}
    for record in records:
        fields = parse_json_object(record)
        rows.append([fields.get(key) for key in keys])
        if len(known) < _MAX_KNOWN_KEYS:
            known |= dict.fromkeys(key for key in fields if len(key) <= MAX_COLUMN_TEXT)
    columns = dict(zip(keys, zip(*rows, strict=True), strict=True)) if rows else {}
    return JsonColumns(
        {key: np.array([*map(_to_number, columns.get(key, ()))], np.float64) for key in keys},
        {key: np.array([*map(_to_text, columns.get(key, ()))], np.str_) for key in keys},
        list(known),
    )


def join_columns(parts: Sequence[JsonColumns]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the columns of all shards that have any value, and the names of keys that exist."""
    columns = {}
    for key in parts[0].numbers:
        numbers = np.concatenate([part.numbers[key] for part in parts])
        texts = np.concatenate([part.texts[key] for part in parts])
        num_numbers, num_texts = (~np.isnan(numbers)).sum(), (texts != "").sum()
        if num_numbers or num_texts:
            columns[key] = numbers if num_numbers >= num_texts else texts
    return columns, list(dict.fromkeys(key for part in parts for key in part.known))


def _to_number(value: Any) -> float:
    if not isinstance(value, int | float):
        return np.nan
    try:
        return float(value)
    except OverflowError:
        return np.nan


def _to_text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_COLUMN_TEXT:
        return ""
    return value.encode("utf-8", "replace").decode()
