"""Loading images and captions: ours against webdataset.

    python -m benchmarks.data                        # four cases without workers, one with two
    python -m benchmarks.data --case 256-64 --out runs/data.json
    python -m benchmarks.data --images DIR           # JPEGs of your own
    python -m benchmarks.data --quick                # does it run?

A case is the size of the JPEGs and the side of the square that a batch gets: 256-64, 256-256,
640-256, 640-64. The 142 COCO pictures of ../shared/data/coco_mini are repeated to 3000 samples in
six shards, as JPEGs (quality 92) of 256 x 256 or of 640 x 480 pixels, without colour profiles. Both
sides read, decode, crop at a random place, resize (antialiased bicubic), flip, and make uint8
batches of 64 with captions. webdataset: `.shuffle(500).decode("pil")`, and Pillow for the rest.
Numbers are CPU microseconds a sample, user and system, with the workers; each measurement runs in
a process of its own, over --samples samples. The ratio is to webdataset, and above 1 is faster.
"""

import io
import random
import tempfile
import warnings
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

from PIL import Image, ImageOps

from benchmarks import harness

BASE = "webdataset"
PICTURES = harness.SHARED / "data" / "coco_mini"
BATCH, SHARDS = 64, 6
SOURCES = {256: (256, 256), 640: (640, 480)}  # width and height of the JPEGs
CASES = {"256-64": (256, 64), "256-256": (256, 256), "640-256": (640, 256), "640-64": (640, 64)}
WITH_WORKERS = "256-256"  # the case that is measured with workers as well


def main(words: list[str] | None = None) -> None:
    """Measures each case."""
    parser = harness.make_parser("data", __doc__)
    parser.add_argument("--case", choices=CASES, help="one case only")
    parser.add_argument("--workers", type=int, default=2, help="of the last case (default: 2)")
    parser.add_argument(
        "--samples", type=int, default=3072, help="of a measurement (default: 3072)"
    )
    parser.add_argument("--images", type=Path, default=PICTURES, help="JPEGs, searched")
    args = harness.parse(parser, words)
    pictures = find_pictures(args.images)
    if not pictures:
        parser.error(f"--images {args.images}: there is no .jpg; give a folder with some")
    total = 3000
    if args.quick:
        args.samples, total, pictures = 2 * BATCH, 4 * BATCH, pictures[:8]
    chosen = {args.case: CASES[args.case]} if args.case else CASES
    load_libraries()
    report = harness.Report(args, samples=args.samples, pictures=len(pictures))
    with tempfile.TemporaryDirectory() as temporary:
        folders = {
            source: write_shards(Path(temporary, str(source)), pictures, source, total)
            for source in {source for source, _ in chosen.values()}
        }
        for name, (source, size) in chosen.items():
            for workers in (0, args.workers) if name == WITH_WORKERS else (0,):
                rows = measure(folders[source], size, workers, args)
                report.add(f"loading, {name}, {workers} workers", rows)


def find_pictures(folder: Path = PICTURES) -> list[Path]:
    return sorted(folder.rglob("*.jpg"))


def load_libraries() -> None:
    """Imports in this process what each measured fork needs, so that no fork pays for it."""
    import webdataset  # noqa: F401

    import ldm.data.datamodule  # noqa: F401

    warnings.filterwarnings("ignore", message=".*worker processes in total")  # more than cores


def write_shards(folder: Path, pictures: list[Path], source: int, total: int) -> Path:
    """Writes the pictures, repeated to `total` samples, as shards."""
    from ldm.data.shards.reader import ShardReader, write_shard

    folder.mkdir()
    files = [encode(path, SOURCES[source]) for path in pictures]
    for shard in range(SHARDS):
        samples = [
            (f"{i:06}", {"jpg": files[i % len(files)], "txt": f"picture {i}".encode()})
            for i in range(shard, total, SHARDS)
        ]
        write_shard(folder / f"{shard:05}.tar", samples)
    ShardReader(str(folder))  # writes the index
    return folder


def encode(path: Path, size: tuple[int, int]) -> bytes:
    """Returns a picture as a JPEG of this size, without the colour profile that some have.

    We would convert it to sRGB, and webdataset ignores it.
    """
    image = ImageOps.fit(Image.open(path).convert("RGB"), size, Image.Resampling.BICUBIC)
    image.info.clear()
    file = io.BytesIO()
    image.save(file, "JPEG", quality=92)
    return file.getvalue()


def measure(folder: Path, size: int, workers: int, args) -> list[harness.Row]:
    """Returns the rows of one case."""
    batches = max(1, args.samples // BATCH)
    variants = {
        label: partial(harness.run_forked, partial(load, folder, size, workers, batches))
        for label, load in {BASE: load_peer, "ldm": load_ours}.items()
    }
    title = f"{folder.name} to {size}, {workers} workers"
    seconds = harness.race(variants, rounds=args.rounds, title=title)
    return harness.compare(seconds, base=BASE, unit="us", per=batches * BATCH)


def load_ours(folder: Path, size: int, workers: int, batches: int) -> None:
    """Takes batches of our data module, as a trainer does."""
    from ldm.data.datamodule import TextImageData
    from ldm.utils.allocator import reuse_freed_memory

    reuse_freed_memory()  # as in train.py
    data = TextImageData(
        train=str(folder), val=str(folder), size=size, batch_size=BATCH, workers=workers
    )
    data.trainer = SimpleNamespace(
        world_size=1, num_devices=1, accumulate_grad_batches=1, global_rank=0, max_steps=batches
    )
    consume(data.train_dataloader(), size, batches)


def load_peer(folder: Path, size: int, workers: int, batches: int) -> None:
    """Takes batches of webdataset, over more than one epoch where there are too few samples."""
    import webdataset
    from torch.utils.data import DataLoader

    shards = sorted(map(str, folder.glob("*.tar")))
    samples = (
        webdataset.WebDataset(shards, shardshuffle=len(shards), resampled=False, seed=0)
        .shuffle(500)
        .decode("pil")
        .to_tuple("jpg", "txt", "__key__")
        .map(partial(prepare, size))
        .repeat()
    )
    loader = DataLoader(samples, batch_size=BATCH, num_workers=workers)
    consume(loader, size, batches)


def prepare(size: int, sample: tuple) -> tuple:
    """Crops, resizes and flips one sample of webdataset with Pillow."""
    import numpy as np
    import torch

    image, caption, key = sample
    short = min(image.size)
    left = random.randint(0, image.width - short)
    top = random.randint(0, image.height - short)
    image = image.crop((left, top, left + short, top + short))
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels.flip(-1) if random.random() < 0.5 else pixels.contiguous(), caption, key


def consume(loader, size: int, batches: int) -> None:
    """Takes that many batches, and ends the workers."""
    iterator = iter(loader)
    for batch in islice(iterator, batches):
        images = batch["images"] if isinstance(batch, dict) else batch[0]
        assert tuple(images.shape) == (BATCH, 3, size, size), images.shape
    del iterator, loader


if __name__ == "__main__":
    main()
