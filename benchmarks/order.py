"""What order and index cost beside decoding: python benchmarks/order.py [shards=DIR] [seconds=20]

Three ways through the same samples take turns, a block of samples each, so that a change in the
machine's speed meets all alike: positions and index alone (the permutation of an epoch is in it);
with the reading of the members; and the whole sample, decoded, cropped and scaled. Without `shards`
COCO's mini set is prepared in a temporary folder. Prints one line of JSON.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ldm.data.dataset import TextImageDataset
from ldm.data.position_sampler import PositionBatchSampler, ShuffledOrder
from ldm.data.shards.reader import ShardReader

COCO = Path(__file__).parent.parent.parent / "shared" / "data" / "coco_mini"
BLOCK, SIZE = 64, 64


def prepare(out: str) -> None:
    """The validation pictures of the mini set as shards."""
    given = [f"images={COCO}/val2017", f"annotations={COCO}/annotations/captions_val2017.json"]
    subprocess.run([sys.executable, "-m", "ldm.prepare", "coco", *given, f"out={out}"], check=True)


def main() -> None:
    given = dict(word.split("=") for word in sys.argv[1:])
    with tempfile.TemporaryDirectory() as temporary:
        if "shards" not in given:
            prepare(temporary)
        measure(given.get("shards", temporary), float(given.get("seconds", 20)))


def measure(folder: str, seconds: float) -> None:
    shards = ShardReader(folder)
    dataset = TextImageDataset(shards, size=SIZE, crop="random", flip=0.5, seed=0, train=True)
    spent = {"order": 0.0, "read": 0.0, "sample": 0.0}

    def positions(start: int) -> list[tuple[int, int]]:
        order = ShuffledOrder(
            shards.index.shard_sizes(), seed=0
        )  # a new one: its permutation is paid for
        return next(
            iter(PositionBatchSampler(order, batch=BLOCK, rank=0, world=1, start=lambda: start))
        )

    blocks = 0
    ways = {
        "order": lambda batch: None,
        "read": lambda batch: [shards.read(index) for index, _ in batch],
        "sample": lambda batch: [dataset[at] for at in batch],
    }
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        for name, way in ways.items():
            begun = time.perf_counter()
            way(positions(blocks * BLOCK))
            spent[name] += time.perf_counter() - begun
        blocks += 1
    each = {name: round(1e6 * took / (blocks * BLOCK), 2) for name, took in spent.items()}
    share = {f"{name}_share": round(spent[name] / spent["sample"], 4) for name in ("order", "read")}
    print(json.dumps({"samples": blocks * BLOCK, "us_per_sample": each, **share}))


if __name__ == "__main__":
    main()
