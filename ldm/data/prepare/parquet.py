"""Images and captions in Parquet files, as data sets on the Hugging Face hub have them."""

import glob
import os
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any

from ldm.data.image_decoding import ImageError
from ldm.data.prepare.sources import FolderPart, ImageRecords, is_in_part, require_usable
from ldm.utils.errors import UsageError

_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp")
_CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "description", "sentences")
_RESERVED_FIELDS = {"key", "status", "file_name"}


def read_parquet_records(
    pattern: str,
    *,
    part: FolderPart = "all",
    image_key: str | None = None,
    caption_key: str | None = None,
) -> ImageRecords:
    """Returns the rows of the files that match a glob, in order of file name and row.

    image_key: a column of encoded images, or of the hub's structs {bytes, path}; caption_key: of
    texts, or of lists of them; None guesses. Other columns of texts become fields of the JSON.
    part: "val" is one row in ten, by a checksum of the file's name and the row's number.
    """
    if Path(pattern).is_dir():
        pattern = f"{glob.escape(pattern)}/*.parquet"
    paths = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    sources = {"images": pattern, "part": part, "image_key": image_key}
    records, reader = ImageRecords(Path(pattern), sources), _ParquetReader()
    root = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path()
    for path in paths:
        schema, groups = reader.read_schema(path)
        image = _choose_column(path, schema, "image_key", image_key, _IMAGE_COLUMNS)
        caption = _choose_column(path, schema, "caption_key", caption_key, _CAPTION_COLUMNS)
        columns, number = [column.name for column in schema if _is_text(column.type)], 0
        for group in range(groups):
            for row, fields in enumerate(reader.read_group(path, group, columns).to_pylist()):
                name = f"{path.relative_to(root).as_posix()}#{number}"
                number += 1
                if not is_in_part(name, part):
                    continue
                read = partial(reader.read_image, path, group, image, row)
                text = fields.pop(caption)
                rest = {key: fields[key] for key in fields if key not in _RESERVED_FIELDS}
                records.add_image(read, name, text if isinstance(text, list) else [text], rest)
    return require_usable(records, "(Parquet files) with a caption")


class _ParquetReader:
    """Reads columns of row groups; the images of the last two groups stay in memory."""

    def __init__(self) -> None:
        try:
            from pyarrow import ArrowException
            from pyarrow.parquet import ParquetFile
        except ModuleNotFoundError:
            raise UsageError("Parquet files need another package: pip install pyarrow") from None
        self._open, self._errors = ParquetFile, (ArrowException, OSError)
        self._lock, self._read_images = Lock(), lru_cache(maxsize=2)(self._read_column)

    def read_schema(self, path: Path) -> tuple[Any, int]:
        """Returns the schema of a file, and the number of its row groups."""
        try:
            with self._open(path) as file:
                return file.schema_arrow, file.num_row_groups
        except self._errors as error:
            raise ValueError(f"{path} is no intact Parquet file: {error}") from error

    def read_group(self, path: Path, group: int, columns: list[str]) -> Any:
        try:
            with self._open(path) as file:
                return file.read_row_group(group, columns)
        except self._errors as error:
            raise ValueError(f"{path}: row group {group} is damaged: {error}") from error

    def read_image(self, path: Path, group: int, column: str, row: int) -> bytes:
        """Returns the image of a row; raises ImageError without one."""
        try:
            with self._lock:
                value = self._read_images(path, group, column)[row].as_py()
        except ValueError as error:
            raise ImageError("damaged row group", str(error)) from error
        data = value.get("bytes") if isinstance(value, dict) else value
        if not data:
            raise ImageError("no image bytes", f"{path}, row {row} of row group {group}")
        return data

    def _read_column(self, path: Path, group: int, column: str) -> Any:
        return self.read_group(path, group, [column]).column(column)


def _choose_column(path: Path, schema: Any, key: str, name: str | None, likely: tuple) -> str:
    fits: Callable[[Any], bool] = _is_image if key == "image_key" else _is_text
    found = [column.name for column in schema if fits(column.type)]
    names = [one for one in likely if one in found] or (found if len(found) == 1 else [])
    names = names if name is None else [name] if name in found else []
    if not names:
        kind = "encoded images" if key == "image_key" else "texts"
        columns = ", ".join(f"{column.name} ({column.type})" for column in schema)
        wanted = f"{key}={name} is no column of {kind}." if name else f"which column has {kind}?"
        raise UsageError(f"{path}: {wanted} Give {key}= one of its columns: {columns}")
    return names[0]


def _is_image(type: Any) -> bool:
    from pyarrow import types

    if types.is_struct(type):
        return type.get_field_index("bytes") >= 0
    return types.is_binary(type) or types.is_large_binary(type)


def _is_text(type: Any) -> bool:
    from pyarrow import types

    if types.is_list(type) or types.is_large_list(type):
        type = type.value_type
    return types.is_string(type) or types.is_large_string(type)
