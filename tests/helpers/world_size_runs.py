"""A tiny run for several world sizes, and its shards."""

import io
from collections.abc import Sequence
from pathlib import Path

import recorder
from PIL import Image
from world import CAPTIONS, SIZE, shape

from ldm.data.shards.reader import write_shard

BATCH, STEPS = 12, 20
SIDES = ((16, 16), (24, 16), (16, 16), (16, 24), (16, 16), (25, 17), (16, 16), (32, 16))
BUCKETS = {(16, 16): 0, (24, 16): 1, (25, 17): 1, (16, 24): 2, (32, 16): 3}  # of each of them

RUN = [
    "trainer=ddp",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "data=coco",
    "data.train=shards",
    "data.val=shards",
    "data.val_limit=4",
    f"data.size={SIZE}",
    f"data.batch_size={BATCH}",
    "data.window=2",
    "autoencoder=identity",
    "model.channels=16",
    "+model.dropout=0.1",
    "optimizer.warmup=1",
    "optimizer.decay=constant",
    "validate_first=false",
    "samples.n=1",
    "samples.steps=1",
    "checkpoint.keep_best=0",
    "logger=csv",
    *recorder.NAMED,
]


def resized(png: bytes, width: int, height: int) -> bytes:
    """The image at another size."""
    file = io.BytesIO()
    Image.open(io.BytesIO(png)).resize((width, height)).save(file, "PNG")
    return file.getvalue()


def write(folder: Path, *sizes: int, sides: Sequence[tuple[int, int]] = ((SIZE, SIZE),)) -> int:
    """Shards of so many samples, each with a key of its own; how many there are.

    sides: width and height of each image, in turn.
    """

    def draw(n: int) -> bytes:
        return resized(shape(n % 10), *sides[n % len(sides)])

    folder.mkdir(parents=True)
    for i in range(len(sizes)):
        numbers = range(sum(sizes[:i]), sum(sizes[: i + 1]))
        samples = ((n, {"png": draw(n), "txt": CAPTIONS[n % 10].encode()}) for n in numbers)
        write_shard(folder / f"{i:05}.tar", ((f"{n:04}", members) for n, members in samples))
    return sum(sizes)
