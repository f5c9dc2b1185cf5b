"""The world of scenes as training data, drawn when it is first asked for."""

from ldm.data.datamodule import TextImageData
from ldm.data.scenes.prepare import prepare_scenes
from ldm.utils.files import resolve_path


def locate_scene_folders(
    *,
    folder: str,
    count: int,
    val_count: int,
    size: int,
    family: int = 1,
    frames: int | None = None,
) -> tuple[str, str]:
    """The folders of the training and the validation scenes of these settings."""
    place = resolve_path(folder) / (f"{size}px" if frames is None else f"{size}px-{frames}-frames")
    train = place / (f"train-{count}" if family == 1 else f"train-{count}-by-{family}")
    return str(train), str(place / f"val-{val_count}")


def scenes_data(
    *,
    folder: str,
    count: int,
    val_count: int,
    size: int,
    batch_size: int,
    window: int = 4,
    family: int = 1,
    workers: int = 2,
    val_batch_size: int = 64,
    frames: int | None = None,
    seed: int = 0,
) -> TextImageData:
    """TextImageData on `count` scenes for training and `val_count` others, `size` pixels square.

    Training scenes come in families of `family` (see `world.sample`) that stay together in a batch.
    The shards are made once, in a place under `folder` that their settings name, and are the same
    for every `seed`, which is the training's. Pictures are neither cropped nor flipped: left and
    right are what the captions are about. With `frames`, the first object of each scene moves, in a
    video of so many pictures (see `motion.py`).
    """
    train, val = locate_scene_folders(
        folder=folder, count=count, val_count=val_count, size=size, family=family, frames=frames
    )
    prepare_scenes(out=train, count=count, size=size, split="train", family=family, frames=frames)
    prepare_scenes(out=val, count=val_count, size=size, split="val", frames=frames)
    return TextImageData(
        train=train,
        val=val,
        size=size,
        batch_size=batch_size,
        crop="center",
        flip=0.0,
        window=window,
        group=family,
        workers=workers,
        val_batch_size=val_batch_size,
        frames=frames,
        seed=seed,
    )
