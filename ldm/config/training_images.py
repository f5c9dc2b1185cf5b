"""The pictures that a run was trained on, where they are here already.

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
# What decides which samples of shards there are, and which pictures and captions they become.
SAMPLE_SELECTION_KEYS = ("min_size", "on_error", "frames", "caption_key")


def open_run_images(
    restored: LoadedPipeline, size: int
) -> tuple[TextImageDataset, TextImageDataset]:
    """A run's validation pictures and its training pictures, as a validation sees them.

    Raises CheckpointError where the checkpoint names other code than ours, UsageError where the
    pictures are not there.
    """
    try:
        data = validate_component(OmegaConf.to_container(restored.data), "data")
        places = find_run_data(data)
        how = {name: data[name] for name in SAMPLE_SELECTION_KEYS if name in data}
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{restored.path} does not say what it was trained on ({error}): it was not run. Give "
            "data=DIR, real pictures to compare with"
        ) from error
    return tuple(open_local_images(place, size, **how) for place in places)


def find_run_data(data: dict) -> tuple[ShardSource, ShardSource]:
    """Where the validation and the training pictures of a plain `data` node are."""
    if data["_target_"] == SCENES_TARGET:
        named = ("folder", "count", "val_count", "size", "family", "frames")
        train, val = locate_scene_folders(**{name: data[name] for name in named if name in data})
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
) -> TextImageDataset:
    """The pictures of a source that a file names: of this machine, and no index is written there.

    Raises UsageError where they are not here.
    """
    places = [source] if isinstance(source, str) else source
    try:
        if any(is_url(str(place)) for place in places):
            raise FileNotFoundError(f"{redact_source(source)} is on a server")
        kind = {"min_size": min_size, "on_error": on_error, "caption_key": caption_key}
        shards = ShardReader(source, ReadOptions(**kind, read_only=True))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"the pictures of the run are not here ({error}): give data=DIR, real pictures to "
            "compare with"
        ) from error
    how = {"on_error": on_error, "frames": frames}
    return TextImageDataset(shards, size=size, seed=0, train=False, **how)
