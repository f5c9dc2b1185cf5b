"""Loading images and captions: ours against webdataset.

    python -m benchmarks.data                        # four cases without workers, one with two
    python -m benchmarks.data --case 256-64 --out runs/data.json
    python -m benchmarks.data --images DIR           # JPEGs of your own
    python -m benchmarks.data --quick                # does it run?

A case is the size of the JPEGs and the side of the square that a batch gets: 256-64, 256-256,
640-256, 640-64. The 142 COCO pictures of ../shared/data/coco_mini are repeated to 3000 samples in
six shards, as JPEGs (quality 92) of 256 x 256 or of 640 x 480 pixels, without colour profiles. Both
sides read, decode, crop at a random place, resize (antialiased bicubic), flip, and make uint8
batches of 64 with captions. "ldm, cached" reads moments and text states in float16 from a cache of
as many samples in their place: of the packaged encoders for 64 pixels, of Stable Diffusion 1.x's
for 256; its numbers are random, for how they came about costs nothing here.
webdataset: `.shuffle(500).decode("pil")`, and Pillow for the rest.
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
# Of the encoders: latent channels, factor, tokens, their width, width of the pooled vector or None.
ENCODERS = {64: (12, 8, 24, 128, 128), 256: (4, 8, 77, 768, None)}
CACHED_CASES = ("256-64", "256-256")
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
            cache = Path(temporary, f"cache-{size}") if name in CACHED_CASES else None
            if cache is not None:
                write_random_cache(cache, size, total)
            for workers in (0, args.workers) if name == WITH_WORKERS else (0,):
                rows = measure(folders[source], size, workers, args, cache=cache)
                report.add(f"loading, {name}, {workers} workers", rows)


def find_pictures(folder: Path = PICTURES) -> list[Path]:
    return sorted(folder.rglob("*.jpg"))


def load_libraries() -> None:
    """Imports in this process what each measured fork needs, so that no fork pays for it."""
    import webdataset  # noqa: F401

    import ldm.data.cached.datamodule  # noqa: F401

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


def write_random_cache(folder: Path, size: int, total: int) -> None:
    """Writes a cache of random numbers, of the shapes that images of this size have."""
    import torch

    from ldm.data.cached.format import pack_record, pack_sample
    from ldm.data.cached.manifest import Manifest, write_manifest
    from ldm.data.shards.reader import ShardReader, write_shard

    folder.mkdir()
    channels, factor, length, width, pooled = ENCODERS[size]
    latents = (channels, size // factor, size // factor)
    tensors = {name: torch.randn(latents).half() for name in ("mean", "logvar")}
    tensors["tokens"] = torch.randn(1, length, width).half()
    if pooled:
        tensors["pooled"] = torch.randn(1, pooled).half()
    for shard in range(SHARDS):
        samples = []
        for i in range(shard, total, SHARDS):
            facts = {
                "weights": None,
                "digest": f"{i:064x}",
                "sizes": (size, size, 0, 0, size, size),
            }
            record = pack_record({}, captions=[f"picture {i}"], **facts)
            samples.append((f"{i:06}", pack_sample(tensors, record)))
        write_shard(folder / f"{shard:05}.tar", samples)
    manifest = Manifest(
        state="complete",
        autoencoder="",
        text_encoder="",
        pixels="",
        source="",
        posterior="moments",
        dtype="float16",
        captions=1,
        flips=False,
        size=size,
        latent_channels=channels,
        factor=factor,
        latent_shift=[0.0] * channels,
        latent_scale=[1.0] * channels,
        text_parts=["tokens", *(["pooled"] if pooled else [])],
        text_width=width,
        pooled_width=pooled,
        max_length=length,
        samples=total,
    )
    write_manifest(folder, manifest)
    ShardReader(str(folder))  # writes the index


def measure(
    folder: Path, size: int, workers: int, args, *, cache: Path | None = None
) -> list[harness.Row]:
    """Returns the rows of one case."""
    batches = max(1, args.samples // BATCH)
    variants = {
        label: partial(harness.run_forked, partial(load, folder, size, workers, batches))
        for label, load in {BASE: load_peer, "ldm": load_ours}.items()
    }
    if cache is not None:
        cached = partial(load_cached, cache, size, workers, batches)
        variants["ldm, cached"] = partial(harness.run_forked, cached)
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
    consume(open_loader(data, batches), size, batches)


def load_cached(folder: Path, size: int, workers: int, batches: int) -> None:
    """Takes batches of a cache, as a trainer does."""
    from ldm.data.cached.datamodule import cached_data
    from ldm.utils.allocator import reuse_freed_memory

    reuse_freed_memory()
    data = cached_data(train=str(folder), val=str(folder), batch_size=BATCH, workers=workers)
    loader = open_loader(data, batches)
    for batch in islice(iter(loader), batches):
        assert len(data.train_set.unpack(batch)["moments"][0]) == BATCH


def open_loader(data, batches: int):
    """Returns the training loader of a data module for so many batches."""
    data.trainer = SimpleNamespace(
        world_size=1, num_devices=1, accumulate_grad_batches=1, global_rank=0, max_steps=batches
    )
    return data.train_dataloader()


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
