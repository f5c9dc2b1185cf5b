"""The default training step from a cache of `ldm cache`, against the same step from images.

    python -m benchmarks.cached_step                 # packaged encoders, then Stable Diffusion's
    python -m benchmarks.cached_step --encoders packaged --out runs/cached_step.json
    python -m benchmarks.cached_step --quick         # does it run? (packaged, batches of 4)

A step is all of it: a batch is read (images: decoded), encoded unless it is cached, and trained on,
with AdamW and the average of the weights, by model=nano. Drawn scenes of 64 pixels in batches of
32; the encoders are the packaged ones, or an autoencoder of Stable Diffusion 1.x's size with
random weights (autoencoder=sd) and the packaged CLIP, in batches of 8. "encode" and "read" are
those parts of a step alone. The cache has moments in float16. The ratio is to images.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import harness

BASE = "images"
BATCHES = {"packaged": 32, "sd": 8}


def main(words: list[str] | None = None) -> None:
    """Measures each size of the encoders."""
    parser = harness.make_parser("cached_step", __doc__)
    parser.add_argument("--encoders", choices=BATCHES, help="one of them only")
    args = harness.parse(parser, words)
    chosen = [args.encoders] if args.encoders else ["packaged"] if args.quick else [*BATCHES]
    report = harness.Report(args)
    for name in chosen:
        batch = 4 if args.quick else BATCHES[name]
        with tempfile.TemporaryDirectory() as folder:
            jobs = build_jobs(Path(folder), name, batch)
            for title, make in {
                "step": make_step,
                "encode": make_encode,
                "read": make_read,
            }.items():
                variants = {label: make(job, batch) for label, job in jobs.items()}
                seconds = harness.race(variants, rounds=args.rounds, title=title, warm_up=2)
                rows = harness.compare(seconds, base=BASE)
                report.add(f"{title}, {name} encoders, batches of {batch}", rows)


def build_jobs(folder: Path, name: str, batch: int) -> dict:
    """Returns a run from images and one from a cache of them."""
    import torch

    from ldm.config.caching import write_cache
    from ldm.config.python_api import compose
    from ldm.config.run import build_job
    from ldm.data.scenes.prepare import prepare_scenes
    from ldm.models.autoencoder import AutoencoderKL
    from ldm.models.diffusers_format import save_autoencoder
    from ldm.utils.allocator import reuse_freed_memory

    torch.set_num_threads(1)
    reuse_freed_memory()
    prepare_scenes(out=folder / "scenes", count=128, size=64, split="val")
    parts = []
    if name == "sd":
        save_autoencoder(AutoencoderKL(), folder / "vae", dtype=torch.float32)
        parts = ["autoencoder=sd", f"autoencoder.path={folder / 'vae'}"]
    words = [f"out={folder / 'cache'}", "cache=null", "workers=1", f"batch={batch}", *parts]
    options = {"data": str(folder / "scenes"), "out": str(folder / "cache")}
    write_cache(compose("cache", words), {**options, "ckpt": None, "where": None})
    common = [
        *("name=bench", "trainer=cpu", "eval=none", "features=none", "logger=csv", "samples.n=0"),
        *(f"data.batch_size={batch}", "data.workers=0", "data.size=64", *parts),
    ]
    places = {"images": ("shards", folder / "scenes"), "cache": ("cached", folder / "cache")}
    return {
        label: build_job(
            compose("train", [*common, f"data={kind}", f"data.train={at}", f"data.val={at}"]),
            folder / label,
        )
        for label, (kind, at) in places.items()
    }


def read_batch(job, batch: int, number: int) -> dict:
    """Returns a batch of the training, with tensors."""
    data, places = job.data.train_set, range(number * batch, (number + 1) * batch)
    return data.unpack(data.read_batch([(job.data.order.at(p)[1], p) for p in places]))


def make_step(job, batch: int) -> Callable[[], None]:
    """Returns a whole step."""
    from benchmarks.train_step import train_bare

    fitted = job.module.make_optimizer(job.module.denoiser.parameters(), steps=10_000)
    optimizer, curve = fitted["optimizer"], fitted["lr_scheduler"]["scheduler"]
    done, precision = 0, job.trainer.precision_plugin
    job.module.train()

    def step() -> None:
        nonlocal done
        done += 1
        train_bare(job.module, read_batch(job, batch, done), optimizer, curve, precision, done)

    return step


def make_encode(job, batch: int) -> Callable[[], None]:
    """Returns the encoding of a batch that was read."""
    read = read_batch(job, batch, 0)

    def encode() -> None:
        job.module.encode(read)

    return encode


def make_read(job, batch: int) -> Callable[[], None]:
    """Returns the reading of a batch."""

    def read() -> None:
        read_batch(job, batch, 1)

    return read


if __name__ == "__main__":
    main()
