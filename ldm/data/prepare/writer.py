"""Pictures with captions to shards, laid out as img2dataset lays them out.

    out/00000.tar          000000000.jpg 000000000.json 000000000.txt 000000001.jpg ...
    out/00000_stats.json   counts of that shard; written last, it says that the shard is finished
    out/prepare.json       the settings, so that a second call resumes and none mixes
    out/report.json        what was written, and what was left out by reason
    out/index.npz          where each sample lies, see index.py

The same sources and settings give the same bytes, however often the work was interrupted.
"""

import hashlib
import io
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from tqdm import tqdm

from ldm.data.image_decoding import (
    ImageError,
    needs_no_conversion,
    read_frames,
    read_image,
    read_image_bytes,
    resize_short_side,
)
from ldm.data.prepare.sources import (
    FolderPart,
    ImageRecord,
    ImageRecords,
    read_coco_records,
    read_folder_records,
)
from ldm.data.shards.index import open_index
from ldm.data.shards.reader import write_shard
from ldm.data.shards.tar_headers import scan_shard
from ldm.utils.files import delete_temporary_files, replace_file, resolve_path

ImageFormat = Literal["jpg", "png", "webp"]

_PILLOW_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
_MAX_PER_SHARD = 10_000  # a key is five digits of shard, four of sample
_MAX_PENDING = 32


@dataclass(frozen=True)
class PreparationReport:
    """The number of samples written, and the file names left out, by reason."""

    written: int
    skipped: dict[str, list[str]]


def prepare_coco(
    *,
    images: str,
    annotations: str,
    out: str,
    size: int | None = 512,
    format: ImageFormat = "jpg",
    quality: int = 95,
    samples_per_shard: int = 1000,
    workers: int = 2,
    limit: int | None = None,
) -> PreparationReport:
    """Write shards of a COCO captions file (.json or .json.gz) and its image folder.

    size: pixels of the short side at most (None keeps all); quality: 1..100, for jpg and webp;
    limit: take only the first so many usable records. A picture that already is upright RGB in the
    format and small enough is copied byte for byte.
    Raises FileNotFoundError or ValueError before anything is written where the sources are not
    there, are of the wrong kind, or `out` holds shards of other settings.
    """
    options = _Options(size, format, quality, samples_per_shard, limit)
    records = read_coco_records(resolve_path(images), resolve_path(annotations))
    places = {
        "images": str(resolve_path(images).resolve()),
        "annotations": str(resolve_path(annotations).resolve()),
    }
    return _write_shards(records, resolve_path(out), places, options, workers)


def prepare_folder(
    *,
    images: str,
    out: str,
    size: int | None = 512,
    format: ImageFormat = "jpg",
    quality: int = 95,
    samples_per_shard: int = 1000,
    workers: int = 2,
    limit: int | None = None,
    part: FolderPart = "all",
    frames: int | None = None,
    caption_key: str = "text",
) -> PreparationReport:
    """Write shards of a folder with a metadata.jsonl, or with a.txt beside each a.jpg.

    caption_key: the name that captions have in metadata.jsonl.
    part: "val" takes a tenth of the pictures, chosen by their names alone, "train" the others.
    frames: of animations (WebP, GIF, PNG), which are written as WebP; those with fewer are broken.
    Everything else is as in `prepare_coco`; `folder_records` says what the files hold.
    """
    options = _Options(size, format, quality, samples_per_shard, limit, frames)
    records = read_folder_records(resolve_path(images), part=part, caption_key=caption_key)
    places = {"images": str(resolve_path(images).resolve()), "part": part}
    return _write_shards(records, resolve_path(out), places, options, workers)


@dataclass(frozen=True)
class _Options:
    size: int | None
    format: ImageFormat
    quality: int
    samples_per_shard: int
    limit: int | None
    frames: int | None = None

    def __post_init__(self) -> None:
        if self.format not in _PILLOW_FORMATS:
            raise ValueError(
                f"format must be one of {', '.join(_PILLOW_FORMATS)}, got '{self.format}'"
            )
        if not 1 <= self.samples_per_shard <= _MAX_PER_SHARD:
            raise ValueError(
                f"samples_per_shard must be in 1..{_MAX_PER_SHARD}, got {self.samples_per_shard}"
            )
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must be in 1..100, got {self.quality}")
        if self.frames is not None and (self.frames < 2 or self.format != "webp"):
            raise ValueError(f"frames={self.frames} are 2 or more, in format=webp, or null")
        for name in ("size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, or null, got {value}")


def _write_shards(
    records: ImageRecords, out: Path, places: dict[str, str], options: _Options, workers: int
) -> PreparationReport:
    if workers < 1:
        raise ValueError(f"workers must be 1 or more, got {workers}")
    found = records.found[: options.limit]
    claim_output_folder(out, {**places, **asdict(options), "records": _hash_records(found)})
    step = options.samples_per_shard
    stats = []
    shown = {"desc": "Preparing", "unit": "image" if options.frames is None else "video"}
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(found), **shown) as bar:
        for number, first in enumerate(range(0, len(found), step)):
            shard = _Shard(out, number, found[first : first + step])
            stats.append(shard.finished() or shard.write(options, pool, bar))
            bar.update(first + len(shard.records) - bar.n)
    skipped = dict(records.skipped)
    for name, reason in (item for stat in stats for item in stat["broken"].items()):
        skipped[reason] = [*skipped.get(reason, []), name]
    report = PreparationReport(sum(stat["successes"] for stat in stats), skipped)
    write_json(out / "report.json", asdict(report))
    if report.written == 0:
        raise ValueError(f"none of the {len(found)} images could be read, see {out}/report.json")
    open_index(out)
    return report


def claim_output_folder(out: Path, settings: dict[str, Any]) -> None:
    """Make `out` ours for these settings, or say what stands against it."""
    path = out / "prepare.json"
    if path.is_file():
        before = json.loads(path.read_text())
        differing = [key for key in settings if settings[key] != before.get(key)]
        if differing:
            changes = ", ".join(f"{key} was {before.get(key)}" for key in differing)
            raise ValueError(f"{out} was begun with other settings ({changes}): use another out")
    elif others := [*out.glob("*.tar"), *out.glob("report.json"), *out.glob("index.npz")]:
        raise FileExistsError(f"{others[0]} came from elsewhere: use another out")
    out.mkdir(parents=True, exist_ok=True)
    delete_temporary_files(out, "*" if path.is_file() else f"{path.name}.*")
    write_json(path, settings)


def _hash_records(records: list[ImageRecord]) -> str:
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps([record.file_name, record.captions, record.fields]).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Shard:
    out: Path
    number: int
    records: list[ImageRecord]

    @property
    def tar(self) -> Path:
        return self.out / f"{self.number:05d}.tar"

    @property
    def stats(self) -> Path:
        return self.out / f"{self.number:05d}_stats.json"

    def finished(self) -> dict[str, Any] | None:
        """The statistics of a shard that an earlier call has finished and that is still whole."""
        try:
            stats = json.loads(self.stats.read_text())
            keys = scan_shard(self.tar)[0] if stats["successes"] else []
            if isinstance(stats["broken"], list):  # of before there were reasons
                stats["broken"] = dict.fromkeys(stats["broken"], "broken")
        except (OSError, ValueError):
            return None
        return stats if len(keys) == stats["successes"] else None

    def write(self, options: _Options, pool: ThreadPoolExecutor, bar: tqdm) -> dict[str, Any]:
        """Write the shard, then its statistics."""
        broken: dict[str, str] = {}  # names and reasons

        def make(
            job: tuple[int, ImageRecord],
        ) -> tuple[str, ImageRecord, dict[str, bytes] | ImageError]:
            key = f"{self.number:05d}{job[0]:04d}"
            try:
                return key, job[1], _encode_record(job[1], key, options)
            except ImageError as error:
                return key, job[1], error

        def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
            for key, record, members in _map_in_order(pool, make, enumerate(self.records)):
                bar.update()
                if isinstance(members, ImageError):
                    broken[record.file_name] = members.reason
                else:
                    yield key, members

        written = write_shard(self.tar, samples())
        if written == 0:
            self.tar.unlink()
        stats = {
            "count": len(self.records),
            "successes": written,
            "failed_to_download": 0,
            "failed_to_resize": len(broken),
            "broken": broken,
        }
        write_json(self.stats, stats)
        return stats


def _map_in_order(pool: ThreadPoolExecutor, fn: Callable, items: Iterable) -> Iterator:
    """pool.map that holds few results at a time, so a slow disk does not fill the memory."""
    pending = deque()
    for item in items:
        pending.append(pool.submit(fn, item))
        if len(pending) > _MAX_PENDING:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _encode_record(record: ImageRecord, key: str, options: _Options) -> dict[str, bytes]:
    """The tar members of one picture; ImageError where it is broken."""
    source, count = read_image_bytes(record.path), options.frames
    images = [read_image(source)] if count is None else list(read_frames(source, count))
    original_width, original_height = images[0].size
    fits = options.size is None or min(images[0].size) <= options.size
    if not fits:
        images = [resize_short_side(image, options.size) for image in images]
    image = images[0]
    if fits and count is None and needs_no_conversion(source, _PILLOW_FORMATS[options.format]):
        data = source
    else:
        data = _encode_images(images, options)
    fields = {
        "key": key,
        "status": "success",
        "file_name": record.file_name,
        **record.fields,
        "caption": record.captions[0],
        "captions": record.captions,
        "width": image.width,
        "height": image.height,
        "original_width": original_width,
        "original_height": original_height,
        "sha256": hashlib.sha256(source).hexdigest(),
    }
    text = json.dumps(fields).encode()
    return {options.format: data, "txt": record.captions[0].encode(), "json": text}


def _encode_images(images: list[Image.Image], options: _Options) -> bytes:
    file = io.BytesIO()
    moving = {"save_all": True, "append_images": images[1:]} if len(images) > 1 else {}
    kind = _PILLOW_FORMATS[options.format]
    images[0].save(file, kind, quality=options.quality, **moving)  # PNG ignores the quality
    return file.getvalue()


def write_json(path: Path, value: Any) -> None:
    with replace_file(path) as file:
        file.write(json.dumps(value, indent=1).encode())
