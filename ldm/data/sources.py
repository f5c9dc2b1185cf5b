"""Pictures with captions as people keep them, to a plain list of records."""

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from ldm.data.captions import clean_all, decode

Part = Literal["all", "train", "val"]
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


@dataclass(frozen=True)
class Record:
    """A picture file that exists, its captions (at least one), and further fields to keep."""

    path: Path
    file_name: str
    captions: list[str]
    fields: dict[str, Any]


@dataclass
class Records:
    """What a source holds: usable records, and the names of the others by reason."""

    root: Path
    found: list[Record] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def add(self, file_name: str, texts: list[Any], fields: dict[str, Any]) -> None:
        """Take a picture by its name inside the root, or note why not."""
        captions = clean_all(texts)
        path = self.root / file_name
        if not _is_inside(file_name):
            self._skip("unsafe name", file_name)
        elif not os.path.isfile(path):  # False, too, for names no file can have
            self._skip("missing", file_name)
        elif not captions:
            self._skip("no caption", file_name)
        else:
            self.found.append(Record(path, file_name, captions, fields))

    def _skip(self, reason: str, file_name: str) -> None:
        self.skipped.setdefault(reason, []).append(file_name)


def coco_records(images: Path, annotations: Path) -> Records:
    """The pictures of a COCO captions file (.json or .json.gz), in its order.

    Raises FileNotFoundError where folder, file or all pictures are missing, ValueError where the
    file holds no COCO captions.
    """
    records = _records_in(images)
    coco = _read_json(annotations)
    rows = coco.get("images") if isinstance(coco, dict) else None
    notes = coco.get("annotations") if isinstance(coco, dict) else None
    if not _have(rows, "id", "file_name") or not _have(notes, "image_id", "caption"):
        raise ValueError(
            f"{annotations} is no COCO captions file: it needs 'images' with id and file_name and "
            "'annotations' with image_id and caption, as captions_train2017.json has"
        )
    texts: dict[Any, list[Any]] = {}
    for note in notes:
        texts.setdefault(note["image_id"], []).append(note["caption"])
    for row in rows:
        url = row.get("flickr_url") or row.get("coco_url")
        fields = {"image_id": row["id"], "url": url}
        records.add(str(row["file_name"]), texts.get(row["id"], []), fields)
    return _some(records, f"named by {annotations} with a caption")


def folder_records(images: Path, *, part: Part = "all") -> Records:
    """The pictures of a folder: those its metadata.jsonl names, else all, in order of name.

    A line of metadata.jsonl has file_name and text (a caption or a list of them). Without that
    file the captions of a.jpg are the lines of a.txt beside it.
    part: "val" is one in ten, by a checksum of the name, so that a picture that is added or taken
    away moves no other; "train" is the rest.
    Raises FileNotFoundError where there is no folder or no picture with a caption, ValueError for
    a line that is not as described.
    """
    if part not in get_args(Part):
        raise ValueError(f"part must be {', '.join(get_args(Part))}, got '{part}'")
    records = _records_in(images)
    metadata = images / "metadata.jsonl"
    if metadata.is_file():
        for file_name, text in _metadata_rows(metadata):
            if part in ("all", _part(file_name)):
                records.add(file_name, text if isinstance(text, list) else [text], {})
        return _some(records, f"named by {metadata} with a 'text'")
    for path in sorted(images.rglob("*")):
        file_name = path.relative_to(images).as_posix()
        if path.suffix.lower() in SUFFIXES and part in ("all", _part(file_name)):
            text = path.with_suffix(".txt")
            lines = decode(text.read_bytes()).splitlines() if text.is_file() else []
            records.add(file_name, lines, {})
    return _some(records, "with a .txt of its name (or a line in metadata.jsonl)")


def _part(file_name: str) -> Part:
    return "train" if zlib.crc32(file_name.encode("utf-8", "replace")) % 10 else "val"


def _records_in(images: Path) -> Records:
    if not images.is_dir():
        raise FileNotFoundError(f"image folder not found: {images}")
    return Records(images)


def _some(records: Records, wanted: str) -> Records:
    if not records.found:
        counts = {reason: len(names) for reason, names in records.skipped.items()}
        raise FileNotFoundError(f"no image in {records.root} {wanted}; left out: {counts}")
    return records


def _is_inside(file_name: str) -> bool:
    path = PurePosixPath(file_name)
    return not path.is_absolute() and ".." not in path.parts


def _have(rows: Any, *keys: str) -> bool:
    """Whether rows is a list, not empty, of objects that all have these keys."""
    return (
        isinstance(rows, list)
        and len(rows) > 0
        and all(isinstance(row, dict) and row.keys() >= set(keys) for row in rows)
    )


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"annotation file not found: {path}")
    data = path.read_bytes()
    try:
        return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    except (ValueError, EOFError, RecursionError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error


def _metadata_rows(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(decode(path.read_bytes()).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            named = str(row["file_name"]), row.get("text")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path}, line {number}: need an object with file_name and text ({error!r})"
            ) from error
        yield named
