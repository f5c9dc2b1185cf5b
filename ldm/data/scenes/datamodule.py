"""The drawn world of scenes as training data; the shards are drawn on first use."""

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
    """Returns the folders of the training and the validation scenes of these settings."""
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
    """Returns `count` training scenes and `val_count` others, `size` pixels square.

    family: so many training scenes have the same words (see `sample_scene`) and stay together in a
    batch; frames: of videos in which the first object of each scene moves; None: images.
    `seed` is of the training; the scenes do not depend on it. They are neither cropped nor flipped,
    because captions say left and right.
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
