"""Finds image files and their captions: COCO annotations, metadata.jsonl, or a .txt per image."""

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from ldm.data.captions import clean_captions
from ldm.utils.files import read_text

FolderPart = Literal["all", "train", "val"]
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp")
# Pillow cannot read these, or its reader is too rarely used to trust it with any file.
UNSUPPORTED_SUFFIXES = (
    *(".avif", ".heic", ".heif", ".jxl", ".jp2", ".tif", ".tiff", ".svg", ".psd", ".tga", ".ppm"),
    *(".ico", ".dng", ".cr2", ".nef", ".arw", ".exr", ".mp4", ".mov", ".webm", ".mkv", ".avi"),
)


@dataclass(frozen=True)
class ImageRecord:
    """How to read an encoded image, its captions (at least one), and more fields for its JSON."""

    read: Callable[[], bytes]
    file_name: str
    captions: list[str]
    fields: dict[str, Any]


@dataclass
class ImageRecords:
    """The usable records of a source, and the names of the others by reason.

    sources: the settings that determine them, as plain values for `prepare.json`.
    """

    root: Path
    sources: dict[str, Any]
    usable: list[ImageRecord] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def add(self, file_name: str, texts: list[Any], fields: dict[str, Any]) -> None:
        """Adds an image by its name inside the root, or skips it with the reason."""
        path, name = self.root / file_name, PurePosixPath(file_name)
        if name.is_absolute() or ".." in name.parts:
            self.skip("unsafe name", file_name)
        elif not os.path.isfile(path):  # also False for names that no file can have
            self.skip("missing", file_name)
        else:
            from ldm.data.image_decoding import read_image_bytes  # torch, for whoever needs it

            self.add_image(partial(read_image_bytes, path), file_name, texts, fields)

    def add_image(
        self, read: Callable[[], bytes], name: str, texts: list[Any], fields: dict[str, Any]
    ) -> None:
        """Adds an image by any unique name, or skips it without a caption."""
        if captions := clean_captions(texts):
            self.usable.append(ImageRecord(read, name, captions, fields))
        else:
            self.skip("no caption", name)

    def skip(self, reason: str, file_name: str) -> None:
        self.skipped.setdefault(reason, []).append(file_name)


def read_coco_records(images: Path, annotations: Path) -> ImageRecords:
    """Returns the images of a COCO captions file (.json or .json.gz), in its order."""
    records = _open_records(images, annotations=str(annotations.resolve()))
    coco = _read_annotations(annotations)
    rows, notes = (
        coco.get(name) if isinstance(coco, dict) else None for name in ("images", "annotations")
    )
    if not _have_keys(rows, "id", "file_name") or not _have_keys(notes, "image_id", "caption"):
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
    return require_usable(records, f"named by {annotations} with a caption")


def read_folder_records(
    images: Path, *, part: FolderPart = "all", caption_key: str = "text"
) -> ImageRecords:
    """Returns the images that a folder's metadata.jsonl names, else all, in order of name.

    A line of metadata.jsonl has file_name and, under `caption_key`, a caption or a list of them.
    Without that file a.txt holds the caption of a.jpg. It follows links to folders.
    part: "val" is one in ten, by a checksum of the name, so that adding an image moves no other.
    """
    records = _open_records(images, part=part)
    metadata = images / "metadata.jsonl"
    if metadata.is_file():
        for file_name, text in _iterate_metadata(metadata, caption_key):
            if is_in_part(file_name, part):
                records.add(file_name, text if isinstance(text, list) else [text], {})
        return require_usable(records, f"named by {metadata} with a '{caption_key}'")
    for path in sorted(_walk_files(images)):
        file_name, suffix = path.relative_to(images).as_posix(), path.suffix.lower()
        if suffix not in IMAGE_SUFFIXES + UNSUPPORTED_SUFFIXES:
            continue
        if not is_in_part(file_name, part):
            continue
        if is_hidden(file_name):
            records.skip("hidden", file_name)
        elif suffix in UNSUPPORTED_SUFFIXES:
            records.skip(f"in {suffix[1:]}, which is not read", file_name)
        else:
            _add_with_text(records, file_name)
    return require_usable(records, "with a .txt of its name (or a line in metadata.jsonl)")


def list_image_files(folder: Path) -> list[Path]:
    """Returns the image files directly in a folder, in order of name, without hidden ones."""
    found = (path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(path for path in found if not is_hidden(path.name))


def is_hidden(file_name: str) -> bool:
    """Whether a part of the path is named .name or __MACOSX."""
    parts = PurePosixPath(file_name).parts
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _add_with_text(records: ImageRecords, file_name: str) -> None:
    text = (records.root / file_name).with_suffix(".txt")
    try:
        texts = [read_text(text)] if text.is_file() else []
    except ValueError:
        records.skip("caption neither in UTF-8 nor in UTF-16 with a byte order mark", file_name)
    else:
        records.add(file_name, texts, {})


def _walk_files(root: Path) -> Iterator[Path]:
    """Yields all files below a folder, each folder once: its own first, then linked ones."""
    seen, links = set(), [root]
    while links:
        for folder, names, files in os.walk(links.pop(0)):
            real = os.path.realpath(folder)
            if real in seen:
                names.clear()
                continue
            seen.add(real)
            yield from (Path(folder, name) for name in files)
            linked = sorted(path for name in names if (path := Path(folder, name)).is_symlink())
            # A link to a folder that contains this one would add all its other content.
            links += [p for p in linked if not Path(real).is_relative_to(os.path.realpath(p))]


def is_in_part(name: str, part: FolderPart) -> bool:
    """Whether a record belongs to a part: one in ten, by the checksum of its name, is in "val"."""
    if part not in get_args(FolderPart):
        raise ValueError(f"part must be {', '.join(get_args(FolderPart))}, got '{part}'")
    is_val = zlib.crc32(name.encode("utf-8", "replace")) % 10 == 0
    return part == "all" or is_val == (part == "val")


def _open_records(images: Path, **sources: str) -> ImageRecords:
    if not images.is_dir():
        raise FileNotFoundError(f"image folder not found: {images}")
    return ImageRecords(images, {"images": str(images.resolve()), **sources})


def require_usable(records: ImageRecords, wanted: str) -> ImageRecords:
    """Returns the records; raises FileNotFoundError if none is usable."""
    if not records.usable:
        counts = {reason: len(names) for reason, names in records.skipped.items()}
        unread = any(reason.endswith("not read") for reason in counts)
        remedy = f" (convert to one of {', '.join(IMAGE_SUFFIXES)})" if unread else ""
        raise FileNotFoundError(f"no image in {records.root} {wanted}; left out: {counts}{remedy}")
    return records


def _have_keys(rows: Any, *keys: str) -> bool:
    """Whether rows is a non-empty list of objects that all have these keys."""
    return (
        isinstance(rows, list)
        and len(rows) > 0
        and all(isinstance(row, dict) and row.keys() >= set(keys) for row in rows)
    )


def _read_annotations(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"annotation file not found: {path}")
    data = path.read_bytes()
    try:
        return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    except (ValueError, EOFError, RecursionError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error


def _iterate_metadata(path: Path, caption_key: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            named = str(row["file_name"]), row.get(caption_key)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path}, line {number}: need an object with file_name and {caption_key} "
                f"({error!r})"
            ) from error
        yield named
