"""Scenes to tar shards, in the layout of data/prepare/writer.py but without statistics.

The same settings give the same bytes, with any number of workers and after interruptions.
"""

import io
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ldm.data.prepare.writer import OutputShard, PreparationReport, claim_output_folder, plan_shards
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
from ldm.utils.files import resolve_path, write_json
from ldm.utils.locks import hold_lock

_SCENES_PER_SHARD = 500
_PHRASINGS = 3

SceneFactory = partial  # of `sample_scene` or `sample_moving_scene`: scene and generator by index
Encoded = tuple[dict[str, bytes], list[str]]  # the image or video as a tar member; captions


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
    """Writes the first `count` scenes of a split as shards of `size` pixels square.

    family: see `sample_scene`; frames: of moving scenes, as lossless animated WebP (None: PNG).
    A second call writes nothing, and a call at the same time waits for the first.
    """
    for name, value, least in (("count", count, 1), ("size", size, 16), ("workers", workers, 1)):
        if value < least:
            raise ValueError(f"{name} must be {least} or more, got {value}")
    if family < 1 or _SCENES_PER_SHARD % family:
        raise ValueError(
            f"family must divide a shard's {_SCENES_PER_SHARD} scenes (5, 10), got {family}"
        )
    if frames is not None and frames < 2:
        raise ValueError(f"frames={frames}: a video has 2 or more, and images have frames=null")
    if frames is not None and family > 1:
        raise ValueError(f"family={family} is for images: leave it out with frames={frames}")
    settings = {"scenes": count, "size": size, "split": split, "seed": seed, "family": family}
    if frames is None:
        factory = partial(sample_scene, split=split, seed=seed, family=family)
        encode, unit = partial(_draw_image, size=size), "image"
    else:
        settings |= {"frames": frames, "motion": MOTION_VERSION}
        factory = partial(sample_moving_scene, split=split, seed=seed)
        encode, unit = partial(_draw_video, size=size, frames=frames), "video"
    factory(0)  # raises for a split or family that does not exist
    folder = resolve_path(out)
    folder.mkdir(parents=True, exist_ok=True)
    report = PreparationReport(written=count, skipped={})
    with hold_lock(folder / "prepare.lock"):
        claim_output_folder(folder, settings | {"world": WORLD_VERSION})
        shards = plan_shards(folder, range(count), samples_per_shard=_SCENES_PER_SHARD)
        missing = [shard for shard in shards if not shard.tar.is_file()]
        if missing or not (folder / "report.json").is_file():
            write = partial(_write_scene_shard, size=size, factory=factory, encode=encode)
            todo = sum(len(shard.items) for shard in missing)
            with (
                ProcessPoolExecutor(workers) as pool,
                tqdm(total=count, desc="Drawing scenes", unit=unit, initial=count - todo) as bar,
            ):
                for written in pool.map(write, missing):
                    bar.update(written)
            open_index(folder)
            write_json(folder / "report.json", asdict(report))
    return report


def _write_scene_shard(
    shard: OutputShard, *, size: int, factory: SceneFactory, encode: Callable[..., Encoded]
) -> int:
    """Writes the scenes whose indices are the shard's items; returns their number."""

    def make(place: int, index: int) -> tuple[str, dict[str, bytes]]:
        scene, rng = factory(index)
        members, captions = encode(scene, rng)
        fields = {
            "key": shard.key(place),
            **factory.keywords,
            "index": index,
            **asdict(scene),
            "caption": captions[0],
            "captions": captions,
            "width": size,
            "height": size,
        }
        text = json.dumps(fields).encode()
        return shard.key(place), {**members, "txt": captions[0].encode(), "json": text}

    return shard.write(make(*item) for item in enumerate(shard.items))


def _draw_image(scene: Scene, rng: np.random.Generator, *, size: int) -> Encoded:
    file = io.BytesIO()
    Image.fromarray(draw_scene(scene, size, rng)).save(file, "PNG")
    return {"png": file.getvalue()}, [caption(scene, rng) for _ in range(_PHRASINGS)]


def _draw_video(
    moving: MovingScene, rng: np.random.Generator, *, size: int, frames: int
) -> Encoded:
    first, *others = map(Image.fromarray, draw_moving_scene(moving, frames, size, rng))
    file = io.BytesIO()
    first.save(file, "WEBP", save_all=True, append_images=others, lossless=True, duration=125)
    return {"webp": file.getvalue()}, [caption_moving_scene(moving, rng) for _ in range(_PHRASINGS)]
