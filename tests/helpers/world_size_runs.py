"""A tiny run for several world sizes, and its shards."""

from pathlib import Path

import recorder
from world import CAPTIONS, SIZE, shape

from ldm.data.shards.reader import write_shard

BATCH, STEPS = 12, 20


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


def write(folder: Path, *sizes: int) -> int:
    """Shards of so many samples, each with a key of its own; how many there are."""
    folder.mkdir(parents=True)
    for i in range(len(sizes)):
        numbers = range(sum(sizes[:i]), sum(sizes[: i + 1]))
        samples = ((n, {"png": shape(n % 10), "txt": CAPTIONS[n % 10].encode()}) for n in numbers)
        write_shard(folder / f"{i:05}.tar", ((f"{n:04}", members) for n, members in samples))
    return sum(sizes)
