"""Pictures with captions as people keep them, to a plain list of records."""

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from ldm.data.captions import clean_captions
from ldm.utils.files import read_text

FolderPart = Literal["all", "train", "val"]
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp")
# What Pillow has no reader for, or one that is not needed often enough to trust it with any file.
UNSUPPORTED_SUFFIXES = (
    *(".avif", ".heic", ".heif", ".jxl", ".jp2", ".tif", ".tiff", ".svg", ".psd", ".tga", ".ppm"),
    *(".ico", ".dng", ".cr2", ".nef", ".arw", ".exr", ".mp4", ".mov", ".webm", ".mkv", ".avi"),
)


@dataclass(frozen=True)
class ImageRecord:
    """A picture file that exists, its captions (at least one), and further fields to keep."""

    path: Path
    file_name: str
    captions: list[str]
    fields: dict[str, Any]


@dataclass
class ImageRecords:
    """What a source holds: usable records, and the names of the others by reason."""

    root: Path
    found: list[ImageRecord] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def add(self, file_name: str, texts: list[Any], fields: dict[str, Any]) -> None:
        """Take a picture by its name inside the root, or note why not."""
        captions = clean_captions(texts)
        path = self.root / file_name
        if not _is_inside(file_name):
            self.skip("unsafe name", file_name)
        elif not os.path.isfile(path):  # False, too, for names no file can have
            self.skip("missing", file_name)
        elif not captions:
            self.skip("no caption", file_name)
        else:
            self.found.append(ImageRecord(path, file_name, captions, fields))

    def skip(self, reason: str, file_name: str) -> None:
        """Leave a picture out."""
        self.skipped.setdefault(reason, []).append(file_name)


def read_coco_records(images: Path, annotations: Path) -> ImageRecords:
    """The pictures of a COCO captions file (.json or .json.gz), in its order.

    Raises FileNotFoundError where folder, file or all pictures are missing, ValueError where the
    file holds no COCO captions.
    """
    records = _open_records(images)
    coco = _read_annotations(annotations)
    rows = coco.get("images") if isinstance(coco, dict) else None
    notes = coco.get("annotations") if isinstance(coco, dict) else None
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
    return _require_usable(records, f"named by {annotations} with a caption")


def read_folder_records(
    images: Path, *, part: FolderPart = "all", caption_key: str = "text"
) -> ImageRecords:
    """The pictures of a folder: those its metadata.jsonl names, else all, in order of name.

    A line of metadata.jsonl has file_name and, under `caption_key`, a caption or a list of them.
    Without that file the caption of a.jpg is a.txt beside it, whose lines are joined, as those of a
    .txt in a shard are. Links to folders are followed; hidden ones are left out.
    part: "val" is one in ten, by a checksum of the name, so that a picture that is added or taken
    away moves no other; "train" is the rest.
    Raises FileNotFoundError where there is no folder or no picture with a caption, ValueError for
    a line that is not as described.
    """
    if part not in get_args(FolderPart):
        raise ValueError(f"part must be {', '.join(get_args(FolderPart))}, got '{part}'")
    records = _open_records(images)
    metadata = images / "metadata.jsonl"
    if metadata.is_file():
        for file_name, text in _iterate_metadata(metadata, caption_key):
            if part in ("all", _choose_part(file_name)):
                records.add(file_name, text if isinstance(text, list) else [text], {})
        return _require_usable(records, f"named by {metadata} with a '{caption_key}'")
    for path in sorted(_walk_files(images)):
        file_name = path.relative_to(images).as_posix()
        suffix = path.suffix.lower()
        if suffix not in IMAGE_SUFFIXES + UNSUPPORTED_SUFFIXES or part not in (
            "all",
            _choose_part(file_name),
        ):
            continue
        if is_hidden(file_name):
            records.skip("hidden", file_name)
        elif suffix in UNSUPPORTED_SUFFIXES:
            records.skip(f"in {suffix[1:]}, which is not read", file_name)
        else:
            _add_with_text(records, file_name)
    return _require_usable(records, "with a .txt of its name (or a line in metadata.jsonl)")


def list_image_files(folder: Path) -> list[Path]:
    """The picture files that lie in a folder itself, in order of name, without hidden ones."""
    found = (path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(path for path in found if not is_hidden(path.name))


def is_hidden(file_name: str) -> bool:
    """Whether a file, or a folder on the way to it, is of a program's own: .name or __MACOSX."""
    parts = PurePosixPath(file_name).parts
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _add_with_text(records: ImageRecords, file_name: str) -> None:
    """Take a picture with the text of the .txt file beside it."""
    text = (records.root / file_name).with_suffix(".txt")
    try:
        texts = [read_text(text)] if text.is_file() else []
    except ValueError:
        records.skip("caption neither in UTF-8 nor in UTF-16 with a byte order mark", file_name)
    else:
        records.add(file_name, texts, {})


def _walk_files(root: Path) -> Iterator[Path]:
    """All files below a folder, each folder once: those that lie there, then linked ones."""
    seen, links = set(), [root]
    while links:
        for folder, names, files in os.walk(links.pop(0)):
            place = os.path.realpath(folder)
            if place in seen:
                names.clear()
                continue
            seen.add(place)
            yield from (Path(folder, name) for name in files)
            linked = sorted(path for name in names if (path := Path(folder, name)).is_symlink())
            # A folder that holds this one would bring it in again, with all that lies beside it.
            links += [path for path in linked if not _contains(path, place)]


def _contains(link: Path, place: str) -> bool:
    return Path(place).is_relative_to(os.path.realpath(link))


def _choose_part(file_name: str) -> FolderPart:
    return "train" if zlib.crc32(file_name.encode("utf-8", "replace")) % 10 else "val"


def _open_records(images: Path) -> ImageRecords:
    if not images.is_dir():
        raise FileNotFoundError(f"image folder not found: {images}")
    return ImageRecords(images)


def _require_usable(records: ImageRecords, wanted: str) -> ImageRecords:
    if not records.found:
        counts = {reason: len(names) for reason, names in records.skipped.items()}
        unread = any(reason.endswith("not read") for reason in counts)
        remedy = f" (convert to one of {', '.join(IMAGE_SUFFIXES)})" if unread else ""
        raise FileNotFoundError(f"no image in {records.root} {wanted}; left out: {counts}{remedy}")
    return records


def _is_inside(file_name: str) -> bool:
    path = PurePosixPath(file_name)
    return not path.is_absolute() and ".." not in path.parts


def _have_keys(rows: Any, *keys: str) -> bool:
    """Whether rows is a list, not empty, of objects that all have these keys."""
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
