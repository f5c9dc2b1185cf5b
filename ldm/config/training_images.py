"""Real images to compare with: of a setting, or those that a run was trained on.

A checkpoint may come from anyone: what it says of its data is read, and nothing is drawn, fetched
or written for it.
"""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ldm.config.cache_settings import CACHED_TARGET
from ldm.config.command_line import TextOptions
from ldm.config.pipeline import LoadedPipeline
from ldm.config.registry import validate_component
from ldm.config.search_path import list_group_options
from ldm.data.dataset import TextImageDataset
from ldm.data.image_decoding import TargetSize, read_image_size
from ldm.data.scenes.datamodule import locate_scene_folders
from ldm.data.scenes.world import WORLD_VERSION
from ldm.data.shards.cache import ShardCache
from ldm.data.shards.data_sets import list_locations
from ldm.data.shards.index import ReadOptions
from ldm.data.shards.locations import ShardSource, is_url, redact_source
from ldm.data.shards.reader import ShardReader
from ldm.experiments.model_card import shorten_place
from ldm.utils.checkpoint_file import CheckpointError
from ldm.utils.errors import UsageError
from ldm.utils.files import resolve_path

CACHED_IMAGES = ("val_images", "train_images")
SCENES_TARGET = "ldm.data.scenes.datamodule.scenes_data"
# The settings that decide which samples shards have, and which images and captions they give.
SAMPLE_SELECTION_KEYS = ("min_size", "on_error", "frames", "caption_key", "captions")
FILTER_KEYS = ("val_where", "where")  # of validation, of training


def open_run_images(
    loaded: LoadedPipeline, size: TargetSize
) -> tuple[TextImageDataset, TextImageDataset]:
    """A run's validation images and its training images, as a validation reads them.

    Raises CheckpointError where the checkpoint names other code than ours, UsageError where the
    images are not here.
    """
    if loaded.data.get("_target_") is None:  # a published model
        raise UsageError(
            f"{loaded.path} names no images: give data=DIR, real images to compare with"
        )
    if loaded.data["_target_"] == CACHED_TARGET and None in map(loaded.data.get, CACHED_IMAGES):
        raise UsageError(
            f"{loaded.path} was trained from a cache of latents, and names no images: give "
            "data=DIR, real images to compare with"
        )
    try:
        data = validate_component(OmegaConf.to_container(loaded.data), "data")
        places = find_run_data(data)
        options = {name: data[name] for name in SAMPLE_SELECTION_KEYS if name in data}
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{loaded.path} does not say what it was trained on ({error}): it was not run. Give "
            "data=DIR, real images to compare with"
        ) from error
    if data["_target_"] == SCENES_TARGET:
        with explain_missing_images():
            check_scenes_drawn(data, *places)
    return tuple(
        open_local_images(place, size, **options, where=data.get(key))
        for place, key in zip(places, FILTER_KEYS, strict=True)
    )


def find_run_data(data: dict) -> tuple[ShardSource, ShardSource]:
    """The locations of the validation and the training images of a plain `data` node."""
    if data["_target_"] == SCENES_TARGET:
        names = ("folder", "count", "val_count", "size", "family", "frames")
        train, val = locate_scene_folders(**{name: data[name] for name in names if name in data})
    elif data["_target_"] == CACHED_TARGET:
        val, train = (data[name] for name in CACHED_IMAGES)
    else:
        train, val = data["train"], data["val"]
    return val, train


def check_scenes_drawn(data: dict, val: str, train: str) -> None:
    """FileNotFoundError with the commands that draw the scenes of `data`, if they are missing."""
    counts = {(val, "val"): data["val_count"], (train, "train"): data["count"]}
    frames = f" frames={data['frames']}" if data.get("frames") else ""
    commands = [
        f"`python -m ldm.prepare scenes part={part} limit={count} size={data['size']}{frames} "
        f"out={shlex.quote(place)}`"
        for (place, part), count in counts.items()
        if not Path(place).is_dir()
    ]
    if commands and data.get("family", 1) == 1:  # others are drawn by a training alone
        raise FileNotFoundError(
            f"the scenes of the run are not on this machine: {' and '.join(commands)} draws them"
        )


def describe_run_data(loaded: LoadedPipeline) -> list[str]:
    """Where the training images are from, and their digests where they are on this machine."""
    data = loaded.data
    if data._target_ == SCENES_TARGET:
        lines = [f"drawn scenes, version {WORLD_VERSION}, {data.count} for training"]
    else:
        places = list_locations(data.get("train") or [])
        places = [shorten_place(redact_source(one)) for one in places]
        lines = [f"{', '.join(places) or 'images'}, for training"]
    try:
        val, train = open_run_images(loaded, loaded.size)
    except ValueError:
        return [*lines, "its digest is not known: the images are not where this bundle was made"]
    for name, images in (("training", train), ("validation", val)):
        index = images.shards.index
        lines.append(f"digest of {len(images)} images for {name}: {index.fingerprint}")
    return lines


def open_local_images(
    source: ShardSource,
    size: TargetSize,
    *,
    min_size: int | None = None,
    where: str | None = None,
    on_error: str = "stop",
    frames: int | None = None,
    caption_key: str | None = None,
    captions: dict[str, float] | None = None,
) -> TextImageDataset:
    """The images of a source on this machine that a file names, read without writing an index."""
    with explain_missing_images():
        if any(is_url(str(place)) for place in list_locations(source)):
            raise FileNotFoundError(f"{redact_source(source)} is on a server")
        options = {"min_size": min_size, "where": where, "on_error": on_error}
        options |= {"caption_key": caption_key, "captions": captions}
        shards = ShardReader(source, ReadOptions(**options, read_only=True))
    return TextImageDataset(
        shards, size=size, seed=0, train=False, on_error=on_error, frames=frames
    )


@contextmanager
def explain_missing_images() -> Iterator[None]:
    """Turns the errors of images that cannot be read into a UsageError with the remedy."""
    try:
        yield
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"the images of the run are not here ({error}): give data=DIR, real images to "
            "compare with"
        ) from error


def open_real_images(
    cfg: DictConfig, options: TextOptions, name: str, size: TargetSize
) -> TextImageDataset:
    """The images in the shards that `data` or `others` names, as a validation reads them."""
    return TextImageDataset(open_real_shards(cfg, options, name), size=size, seed=0, train=False)


def find_real_size(cfg: DictConfig, options: TextOptions, name: str) -> int | None:
    """The short side of real images, in pixels; None where a few of them differ."""
    shards = open_real_shards(cfg, options, name)
    few = range(0, len(shards), len(shards) // 16 + 1)
    sides = {min(read_image_size(shards.read(i).image)) for i in few}
    return sides.pop() if len(sides) == 1 else None


def open_real_shards(cfg: DictConfig, options: TextOptions, name: str) -> ShardReader:
    """The shards that `data` or `others` names; UsageError where none are."""
    place = options[name]
    if place is None:
        raise UsageError(
            f"{name} is needed: give {name}=DIR, shards of real images with captions, as "
            "`python -m ldm.prepare` writes them"
        )
    if place in list_group_options("data") and not resolve_path(place).exists():
        raise UsageError(
            f"{name}={place}: that is an option of train.py; here {name} is a folder with "
            f"shards of real images, such as {name}=data/coco/val"
        )
    cache = ShardCache(cfg.cache, gigabytes=50.0)
    return ShardReader(place, ReadOptions(cache=cache, caption_key=cfg.get("caption_key")))
