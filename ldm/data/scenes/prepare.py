"""Scenes to shards, laid out as ldm/data/prepare/writer.py lays out image files.

    out/00000.tar          000000000.png 000000000.json 000000000.txt 000000001.png ...
    out/prepare.json       the settings; report.json and index.npz are written last

The same settings give the same bytes, with any number of workers and however often the work was
interrupted.
"""

import fcntl
import io
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm.data.prepare.writer import Report, claim, write_json
from ldm.data.scenes import motion
from ldm.data.scenes.draw import draw
from ldm.data.scenes.motion import MOTION_VERSION, Moving, film, sample_moving
from ldm.data.scenes.world import VERSION, Scene, Split, caption, sample
from ldm.data.shards.index import open_index
from ldm.data.shards.reader import write_shard
from ldm.utils.files import located

_PER_SHARD = 500
_PHRASINGS = 3

World = partial  # of `sample` or `sample_moving`: a scene and its generator by number


def prepare_scenes(
    *,
    out: str,
    count: int,
    size: int = 64,
    split: Split = "train",
    seed: int = 0,
    family: int = 1,
    frames: int | None = None,
    workers: int = 2,
) -> Report:
    """Write the first `count` scenes of a split as shards of `size` pixels square.

    `family`: so many scenes of the same words follow one another, see `world.sample`. `frames`: of
    moving scenes, see `motion.py`, as lossless animated WebP; None: pictures, as PNG.

    A second call with the same settings writes nothing, and a call at the same time waits for the
    first. Raises ValueError before anything is written for settings that make no sense or where
    `out` was begun with others, FileExistsError where it holds shards from elsewhere.
    """
    for name, value, least in (("count", count, 1), ("size", size, 16), ("workers", workers, 1)):
        if value < least:
            raise ValueError(f"{name} must be {least} or more, got {value}")
    if family < 1 or _PER_SHARD % family:
        raise ValueError(f"family must divide a shard's {_PER_SHARD} scenes (5, 10), got {family}")
    if frames is not None and frames < 2:
        raise ValueError(f"frames={frames}: a video has 2 or more, and pictures have frames=null")
    if frames is not None and family > 1:
        raise ValueError(f"family={family} is for pictures: leave it out beside frames={frames}")
    if frames is None:
        world = partial(sample, split=split, seed=seed, family=family)
        members = _picture
    else:
        world = partial(sample_moving, split=split, seed=seed)
        members = partial(_video, frames=frames)
    world(0)  # says what is wrong with these
    folder = located(out)
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "report.json"
    with _alone(folder):
        settings = {"scenes": count, "size": size, "split": split, "seed": seed, "family": family}
        moving = {} if frames is None else {"frames": frames, "motion": MOTION_VERSION}
        claim(folder, settings | moving | {"world": VERSION})
        firsts = range(0, count, _PER_SHARD)
        missing = [first for first in firsts if not _shard(folder, first).is_file()]
        if missing or not report.is_file():
            make = partial(_members, size=size, world=world, members=members)
            write = partial(_write, folder=folder, count=count, make=make)
            kind = "image" if frames is None else "video"
            shown = {"total": count, "desc": "Drawing scenes", "unit": kind}
            with ProcessPoolExecutor(workers) as pool, tqdm(**shown) as bar:
                bar.update(count - sum(min(_PER_SHARD, count - first) for first in missing))
                for written in pool.map(write, missing):
                    bar.update(written)
            open_index(folder)
            write_json(report, {"written": count, "skipped": {}})
    return Report(written=count, skipped={})


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Only one process at a time gets past this, so that many may ask for the same scenes."""
    with open(folder / "prepare.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go of when the file is closed, also by a kill
        yield


def _shard(folder: Path, first: int) -> Path:
    return folder / f"{first // _PER_SHARD:05d}.tar"


def _write(first: int, *, folder: Path, count: int, make: Callable) -> int:
    """Write the shard that begins with scene `first`; the number of its scenes."""
    samples = (make(index) for index in range(first, min(first + _PER_SHARD, count)))
    return write_shard(_shard(folder, first), samples)


def _members(
    index: int, *, size: int, world: World, members: Callable
) -> tuple[str, dict[str, bytes]]:
    """Key and tar members of one scene."""
    scene, rng = world(index)
    pixels, captions = members(scene, rng, size)
    number, place = divmod(index, _PER_SHARD)
    key = f"{number:05d}{place:04d}"
    fields = {
        "key": key,
        **world.keywords,
        "index": index,
        **asdict(scene),
        "caption": captions[0],
        "captions": captions,
        "width": size,
        "height": size,
    }
    text = json.dumps(fields).encode()
    return key, {**pixels, "txt": captions[0].encode(), "json": text}


def _picture(
    scene: Scene, rng: np.random.Generator, size: int
) -> tuple[dict[str, bytes], list[str]]:
    """The picture as a tar member, and captions."""
    file = io.BytesIO()
    Image.fromarray(draw(scene, size, rng)).save(file, "PNG")
    return {"png": file.getvalue()}, [caption(scene, rng) for _ in range(_PHRASINGS)]


def _video(
    moving: Moving, rng: np.random.Generator, size: int, *, frames: int
) -> tuple[dict[str, bytes], list[str]]:
    """The video as a tar member, and captions."""
    first, *others = (Image.fromarray(picture) for picture in film(moving, frames, size, rng))
    file = io.BytesIO()
    first.save(file, "WEBP", save_all=True, append_images=others, lossless=True, duration=125)
    return {"webp": file.getvalue()}, [motion.caption(moving, rng) for _ in range(_PHRASINGS)]
