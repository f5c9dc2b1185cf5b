"""The world of scenes as training data, drawn when it is first asked for."""

from pathlib import Path

from ldm.data.datamodule import TextImageData
from ldm.data.scenes.prepare import prepare_scenes


def scenes_data(
    *,
    folder: str,
    count: int,
    val_count: int,
    size: int,
    batch_size: int,
    window: int = 4,
    workers: int = 2,
    val_batch_size: int = 64,
    seed: int = 0,
) -> TextImageData:
    """TextImageData on `count` scenes for training and `val_count` others, `size` pixels square.

    The shards are made once, in a place under `folder` that their settings name, and are the same
    for every `seed`, which is the training's. Pictures are neither cropped nor flipped: left and
    right are what the captions are about.
    """
    place = Path(folder) / f"{size}px"
    counts = {"train": count, "val": val_count}
    shards = {split: str(place / f"{split}-{n}") for split, n in counts.items()}
    for split, out in shards.items():
        prepare_scenes(out=out, count=counts[split], size=size, split=split)
    return TextImageData(
        train=shards["train"],
        val=shards["val"],
        size=size,
        batch_size=batch_size,
        crop="center",
        flip=0.0,
        window=window,
        workers=workers,
        val_batch_size=val_batch_size,
        seed=seed,
    )
