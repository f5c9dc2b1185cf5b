"""The images that a run was trained on, where they are on this machine.

A checkpoint may come from anyone: what it says of its data is read, and nothing is drawn, fetched
or written for it.
"""

from omegaconf import OmegaConf

from ldm.config.pipeline import LoadedPipeline
from ldm.config.registry import validate_component
from ldm.data.dataset import TextImageDataset
from ldm.data.scenes.datamodule import locate_scene_folders
from ldm.data.shards.index import ReadOptions
from ldm.data.shards.locations import ShardSource, is_url, redact_source
from ldm.data.shards.reader import ShardReader
from ldm.utils.checkpoint_file import CheckpointError
from ldm.utils.errors import UsageError

SCENES_TARGET = "ldm.data.scenes.datamodule.scenes_data"
# The settings that decide which samples shards have, and which images and captions they give.
SAMPLE_SELECTION_KEYS = ("min_size", "on_error", "frames", "caption_key", "captions")


def open_run_images(loaded: LoadedPipeline, size: int) -> tuple[TextImageDataset, TextImageDataset]:
    """A run's validation images and its training images, as a validation reads them.

    Raises CheckpointError where the checkpoint names other code than ours, UsageError where the
    images are not here.
    """
    try:
        data = validate_component(OmegaConf.to_container(loaded.data), "data")
        places = find_run_data(data)
        options = {name: data[name] for name in SAMPLE_SELECTION_KEYS if name in data}
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{loaded.path} does not say what it was trained on ({error}): it was not run. Give "
            "data=DIR, real images to compare with"
        ) from error
    return tuple(open_local_images(place, size, **options) for place in places)


def find_run_data(data: dict) -> tuple[ShardSource, ShardSource]:
    """The locations of the validation and the training images of a plain `data` node."""
    if data["_target_"] == SCENES_TARGET:
        names = ("folder", "count", "val_count", "size", "family", "frames")
        train, val = locate_scene_folders(**{name: data[name] for name in names if name in data})
    else:
        train, val = data["train"], data["val"]
    return val, train


def open_local_images(
    source: ShardSource,
    size: int,
    *,
    min_size: int | None = None,
    on_error: str = "stop",
    frames: int | None = None,
    caption_key: str | None = None,
    captions: dict[str, float] | None = None,
) -> TextImageDataset:
    """The images of a source that a file names; UsageError unless it is on this machine.

    No index is written next to them.
    """
    places = [source] if isinstance(source, str) else source
    try:
        if any(is_url(str(place)) for place in places):
            raise FileNotFoundError(f"{redact_source(source)} is on a server")
        options = {"min_size": min_size, "on_error": on_error, "caption_key": caption_key}
        shards = ShardReader(source, ReadOptions(**options, captions=captions, read_only=True))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"the images of the run are not here ({error}): give data=DIR, real images to "
            "compare with"
        ) from error
    return TextImageDataset(
        shards, size=size, seed=0, train=False, on_error=on_error, frames=frames
    )
