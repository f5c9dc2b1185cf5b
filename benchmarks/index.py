"""What index and order cost for large sets: python benchmarks/index.py [shards=100] [samples=1000]

Shards of headers alone (members lie in holes of sparse files) are indexed, loaded and ordered, each
in a process of its own so that its memory can be told. `shards=10000` is ten million samples.
`folder=DIR` keeps them there. Prints one line of JSON a measurement.
"""

import json
import multiprocessing
import os
import resource
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from ldm.data.position_sampler import PositionBatchSampler, ShuffledOrder
from ldm.data.shards.index import INDEX_NAME, open_index

IMAGE, TEXT, RECORD = 100_000, 60, 300  # bytes of the members
SEED = 1
DISTINCT = 100  # further shards are further names of these, to spare the disk


def block(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.USTAR_FORMAT)


def write(path: Path, number: int, samples: int) -> None:
    """A shard as img2dataset names it."""
    with open(path, "wb") as file:
        for n in range(samples):
            key = f"{number:05}{n:04}"
            for suffix, size in (("jpg", IMAGE), ("txt", TEXT), ("json", RECORD)):
                file.write(header(f"{key}.{suffix}", size))
                file.seek(block(size), os.SEEK_CUR)
        file.write(bytes(2 * tarfile.BLOCKSIZE))


def prepare(folder: Path, shards: int, samples: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(shards):
        path = folder / f"{number:05}.tar"
        if path.exists():
            continue
        if number < DISTINCT:
            write(path, number, samples)
        else:
            os.link(folder / f"{number % DISTINCT:05}.tar", path)


def memory() -> int:
    """The most this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def measured(name: str, action: Callable[[], object]) -> None:
    """Run `action` in a fresh process and print its seconds and the memory it added.

    cpu_seconds are its own, without those of processes that it starts.
    """

    def run(out) -> None:
        before, begun = memory(), time.perf_counter()
        note = action()
        seconds = round(time.perf_counter() - begun, 2)
        spent = {"seconds": seconds, "cpu_seconds": round(time.process_time(), 2)}
        out.put({"what": name, **spent, "mib": memory() - before, **(note or {})})

    context = multiprocessing.get_context("fork")
    out = context.SimpleQueue()
    process = context.Process(target=run, args=(out,))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{name} failed")
    print(json.dumps(out.get()), flush=True)


def main() -> None:
    given = dict(word.split("=") for word in sys.argv[1:])
    shards, samples = int(given.get("shards", 100)), int(given.get("samples", 1000))
    folder = Path(given.get("folder") or tempfile.mkdtemp(prefix="ldm-index-"))
    total = shards * samples

    def build() -> dict:
        (folder / INDEX_NAME).unlink(missing_ok=True)
        assert len(open_index(folder)) == total
        return {"samples": total, "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0]}

    def load() -> dict:
        assert len(open_index(folder)) == total
        return {"file_mib": (folder / INDEX_NAME).stat().st_size // 2**20}

    def permutation() -> None:
        ShuffledOrder([samples] * shards, seed=SEED).at(0)

    def start(share: float) -> Callable[[], None]:
        """From nothing to the first batch of a run that goes on there."""

        def resume() -> None:
            order = ShuffledOrder(open_index(folder).shard_sizes(), seed=SEED)
            position = int(3 * total + share * total)
            batches = PositionBatchSampler(order, batch=64, rank=0, world=1, start=lambda: position)
            next(iter(batches))

        return resume

    def batches() -> dict:
        order = ShuffledOrder([samples] * shards, seed=SEED)
        stream = iter(PositionBatchSampler(order, batch=64, rank=0, world=1, start=lambda: 0))
        next(stream)
        begun = time.perf_counter()
        count = sum(len(batch) for batch in islice(stream, min(1000, total // 64 - 1)))
        return {"us_per_sample": round((time.perf_counter() - begun) / count * 1e6, 2)}

    try:
        measured("write the shards", lambda: prepare(folder, shards, samples))
        measured("build the index", build)
        measured("load the index", load)
        measured("order of an epoch", permutation)
        for share in (0.01, 0.5, 0.99):
            measured(f"start at {share:.0%} of an epoch", start(share))
        measured("give out positions", batches)
    finally:
        if "folder" not in given:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
