"""The pictures that a run was trained on, where they are here already.

A checkpoint may come from anyone: what it says of its data is read, and nothing is drawn, fetched
or written for it.
"""

from omegaconf import OmegaConf

from ldm.config import pipeline, registry
from ldm.data.dataset import TextImages
from ldm.data.scenes.datamodule import scene_folders
from ldm.data.shards.locations import Source, is_url, shown
from ldm.data.shards.reader import Shards
from ldm.utils import checkpoint_file
from ldm.utils.errors import UsageError

SCENES = "ldm.data.scenes.datamodule.scenes_data"
# What decides which samples of shards there are, and which pictures and captions they become.
SAMPLES = ("min_size", "on_error", "frames", "caption_key")


def own_pictures(restored: pipeline.Restored, size: int) -> tuple[TextImages, TextImages]:
    """A run's validation pictures and its training pictures, as a validation sees them.

    Raises CheckpointError where the checkpoint names other code than ours, UsageError where the
    pictures are not there.
    """
    try:
        data = registry.admit_component(OmegaConf.to_container(restored.data), "data")
        places = sources(data)
        how = {name: data[name] for name in SAMPLES if name in data}
    except (ValueError, TypeError, KeyError) as error:
        raise checkpoint_file.CheckpointError(
            f"{restored.path} does not say what it was trained on ({error}): it was not run. Give "
            "data=DIR, real pictures to compare with"
        ) from error
    return tuple(opened(place, size, **how) for place in places)


def sources(data: dict) -> tuple[Source, Source]:
    """Where the validation and the training pictures of a plain `data` node are."""
    if data["_target_"] == SCENES:
        named = ("folder", "count", "val_count", "size", "family", "frames")
        train, val = scene_folders(**{name: data[name] for name in named if name in data})
    else:
        train, val = data["train"], data["val"]
    return val, train


def opened(
    source: Source,
    size: int,
    *,
    min_size: int | None = None,
    on_error: str = "stop",
    frames: int | None = None,
    caption_key: str | None = None,
) -> TextImages:
    """The pictures of a source that a file names: of this machine, and no index is written there.

    Raises UsageError where they are not here.
    """
    places = [source] if isinstance(source, str) else source
    try:
        if any(is_url(str(place)) for place in places):
            raise FileNotFoundError(f"{shown(source)} is on a server")
        kind = {"min_size": min_size, "on_error": on_error, "caption_key": caption_key}
        shards = Shards(source, **kind, read_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"the pictures of the run are not here ({error}): give data=DIR, real pictures to "
            "compare with"
        ) from error
    how = {"on_error": on_error, "frames": frames}
    return TextImages(shards, size=size, seed=0, train=False, **how)
