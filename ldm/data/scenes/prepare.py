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

from ldm.data.prepare.writer import PreparationReport, claim_output_folder, write_json
from ldm.data.scenes.draw import draw_scene
from ldm.data.scenes.motion import (
    MOTION_VERSION,
    MovingScene,
    caption_moving_scene,
    draw_moving_scene,
    sample_moving_scene,
)
from ldm.data.scenes.world import WORLD_VERSION, Scene, SceneSplit, caption, sample_scene
from ldm.data.shards.index import open_index
from ldm.data.shards.reader import write_shard
from ldm.utils.files import resolve_path

_SCENES_PER_SHARD = 500
_PHRASINGS = 3

SceneFactory = partial  # of `sample` or `sample_moving`: a scene and its generator by number


def prepare_scenes(
    *,
    out: str,
    count: int,
    size: int = 64,
    split: SceneSplit = "train",
    seed: int = 0,
    family: int = 1,
    frames: int | None = None,
    workers: int = 2,
) -> PreparationReport:
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
    if family < 1 or _SCENES_PER_SHARD % family:
        raise ValueError(
            f"family must divide a shard's {_SCENES_PER_SHARD} scenes (5, 10), got {family}"
        )
    if frames is not None and frames < 2:
        raise ValueError(f"frames={frames}: a video has 2 or more, and pictures have frames=null")
    if frames is not None and family > 1:
        raise ValueError(f"family={family} is for pictures: leave it out beside frames={frames}")
    if frames is None:
        world = partial(sample_scene, split=split, seed=seed, family=family)
        members = _draw_image
    else:
        world = partial(sample_moving_scene, split=split, seed=seed)
        members = partial(_draw_video, frames=frames)
    world(0)  # says what is wrong with these
    folder = resolve_path(out)
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "report.json"
    with _lock_folder(folder):
        settings = {"scenes": count, "size": size, "split": split, "seed": seed, "family": family}
        moving = {} if frames is None else {"frames": frames, "motion": MOTION_VERSION}
        claim_output_folder(folder, settings | moving | {"world": WORLD_VERSION})
        firsts = range(0, count, _SCENES_PER_SHARD)
        missing = [first for first in firsts if not _shard_path(folder, first).is_file()]
        if missing or not report.is_file():
            make = partial(_make_sample, size=size, world=world, members=members)
            write = partial(_write_scene_shard, folder=folder, count=count, make=make)
            kind = "image" if frames is None else "video"
            shown = {"total": count, "desc": "Drawing scenes", "unit": kind}
            with ProcessPoolExecutor(workers) as pool, tqdm(**shown) as bar:
                bar.update(count - sum(min(_SCENES_PER_SHARD, count - first) for first in missing))
                for written in pool.map(write, missing):
                    bar.update(written)
            open_index(folder)
            write_json(report, {"written": count, "skipped": {}})
    return PreparationReport(written=count, skipped={})


@contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
    """Only one process at a time gets past this, so that many may ask for the same scenes."""
    with open(folder / "prepare.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go of when the file is closed, also by a kill
        yield


def _shard_path(folder: Path, first: int) -> Path:
    return folder / f"{first // _SCENES_PER_SHARD:05d}.tar"


def _write_scene_shard(first: int, *, folder: Path, count: int, make: Callable) -> int:
    """Write the shard that begins with scene `first`; the number of its scenes."""
    samples = (make(index) for index in range(first, min(first + _SCENES_PER_SHARD, count)))
    return write_shard(_shard_path(folder, first), samples)


def _make_sample(
    index: int, *, size: int, world: SceneFactory, members: Callable
) -> tuple[str, dict[str, bytes]]:
    """Key and tar members of one scene."""
    scene, rng = world(index)
    pixels, captions = members(scene, rng, size)
    number, place = divmod(index, _SCENES_PER_SHARD)
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


def _draw_image(
    scene: Scene, rng: np.random.Generator, size: int
) -> tuple[dict[str, bytes], list[str]]:
    """The picture as a tar member, and captions."""
    file = io.BytesIO()
    Image.fromarray(draw_scene(scene, size, rng)).save(file, "PNG")
    return {"png": file.getvalue()}, [caption(scene, rng) for _ in range(_PHRASINGS)]


def _draw_video(
    moving: MovingScene, rng: np.random.Generator, size: int, *, frames: int
) -> tuple[dict[str, bytes], list[str]]:
    """The video as a tar member, and captions."""
    first, *others = (
        Image.fromarray(picture) for picture in draw_moving_scene(moving, frames, size, rng)
    )
    file = io.BytesIO()
    first.save(file, "WEBP", save_all=True, append_images=others, lossless=True, duration=125)
    return {"webp": file.getvalue()}, [caption_moving_scene(moving, rng) for _ in range(_PHRASINGS)]
