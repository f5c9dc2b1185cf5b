"""Image files with captions to tar shards, laid out as img2dataset lays them out."""

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
    resize_short_side,
)
from ldm.data.prepare.sources import ImageRecord, ImageRecords
from ldm.data.prepare.writer import OutputShard, PreparationReport, claim_output_folder, plan_shards
from ldm.data.shards.index import open_index
from ldm.utils.files import write_json
from ldm.utils.hashing import hash_bytes

ImageFormat = Literal["jpg", "png", "webp"]

_PILLOW_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
_MAX_PENDING = 32


@dataclass(frozen=True)
class ImageSettings:
    """How image files become samples.

    size: pixels of the short side at most (None changes no size); quality: 1..100, of jpg and webp;
    limit: use only the first usable records; frames: of videos, as animated WebP (None: images).
    """

    size: int | None = 512
    format: ImageFormat = "jpg"
    quality: int = 95
    samples_per_shard: int = 1000
    limit: int | None = None
    frames: int | None = None

    def __post_init__(self) -> None:
        if self.format not in _PILLOW_FORMATS:
            raise ValueError(
                f"format must be one of {', '.join(_PILLOW_FORMATS)}, got '{self.format}'"
            )
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must be in 1..100, got {self.quality}")
        if self.frames is not None and (self.frames < 2 or self.format != "webp"):
            raise ValueError(
                f"frames={self.frames}: videos have 2 or more, in format=webp; null is for images"
            )
        for name in ("size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, or null, got {value}")


_DEFAULTS = ImageSettings()


def write_image_shards(
    records: ImageRecords, out: Path, *, settings: ImageSettings = _DEFAULTS, workers: int = 2
) -> PreparationReport:
    """Writes shards of a source's records, and goes on where an earlier call was stopped.

    With `frames` the records are animations (WebP, GIF, PNG); those with fewer frames are skipped.
    """
    if workers < 1:
        raise ValueError(f"workers must be 1 or more, got {workers}")
    usable = records.usable[: settings.limit]
    shards = plan_shards(out, usable, samples_per_shard=settings.samples_per_shard)
    lines = (json.dumps([r.file_name, r.captions, r.fields]).encode() for r in usable)
    claim_output_folder(out, {**records.sources, **asdict(settings), "records": hash_bytes(*lines)})
    stats = []
    unit = "image" if settings.frames is None else "video"
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(usable), desc="Preparing", unit=unit) as bar,
    ):
        for shard in shards:
            stats.append(shard.read_stats() or _write_image_shard(shard, settings, pool, bar))
            bar.update(min((shard.number + 1) * settings.samples_per_shard, len(usable)) - bar.n)
    skipped = dict(records.skipped)
    for stat in stats:
        broken = stat["broken"]
        if isinstance(broken, list):  # shards of versions without reasons
            broken = dict.fromkeys(broken, "broken")
        for name, reason in broken.items():
            skipped[reason] = [*skipped.get(reason, []), name]
    report = PreparationReport(sum(stat["successes"] for stat in stats), skipped)
    write_json(out / "report.json", asdict(report))
    if report.written == 0:
        raise ValueError(f"none of the {len(usable)} images could be read, see {out}/report.json")
    open_index(out)
    return report


def _write_image_shard(
    shard: OutputShard, settings: ImageSettings, pool: ThreadPoolExecutor, bar: tqdm
) -> dict[str, Any]:
    """Writes a shard, then its statistics, which it returns."""
    broken: dict[str, str] = {}  # reason by file name

    def encode(job: tuple[int, ImageRecord]) -> dict[str, bytes] | ImageError:
        try:
            return _encode_record(job[1], shard.key(job[0]), settings)
        except ImageError as error:
            return error

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for i, members in enumerate(_map_in_order(pool, encode, enumerate(shard.items))):
            bar.update()
            if isinstance(members, ImageError):
                broken[shard.items[i].file_name] = members.reason
            else:
                yield shard.key(i), members

    written = shard.write(samples())
    stats = {
        "count": len(shard.items),
        "successes": written,
        "failed_to_download": 0,
        "failed_to_resize": len(broken),
        "broken": broken,
    }
    write_json(shard.stats, stats)
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


def _encode_record(record: ImageRecord, key: str, settings: ImageSettings) -> dict[str, bytes]:
    """Returns the tar members of one image, whose file is copied if it fits already."""
    source, count = record.read(), settings.frames
    images = [read_image(source)] if count is None else list(read_frames(source, count))
    original_width, original_height = images[0].size
    kind = _PILLOW_FORMATS[settings.format]
    fits = settings.size is None or min(images[0].size) <= settings.size
    if not fits:
        images = [resize_short_side(image, settings.size) for image in images]
    if fits and count is None and needs_no_conversion(source, kind):
        data = source
    else:
        data = _encode_images(images, kind, settings.quality)
    fields = {
        "key": key,
        "status": "success",
        "file_name": record.file_name,
        **record.fields,
        "caption": record.captions[0],
        "captions": record.captions,
        "width": images[0].width,
        "height": images[0].height,
        "original_width": original_width,
        "original_height": original_height,
        "sha256": hash_bytes(source),
    }
    text = json.dumps(fields).encode()
    return {settings.format: data, "txt": record.captions[0].encode(), "json": text}


def _encode_images(images: list[Image.Image], kind: str, quality: int) -> bytes:
    file = io.BytesIO()
    frames = {"save_all": True, "append_images": images[1:]} if len(images) > 1 else {}
    images[0].save(file, kind, quality=quality, **frames)  # PNG ignores the quality
    return file.getvalue()
