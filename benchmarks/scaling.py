"""How the time grows with the size of the work, and with which exponent.

    python -m benchmarks.scaling                     # all series, 5 rounds
    python -m benchmarks.scaling --only batch
    python -m benchmarks.scaling --out runs/scaling.json --picture docs/pictures/scaling.png
    python -m benchmarks.scaling --quick             # does it run?

  batch        a training step over images (S: 6.3 M parameters, latents 4 x 8 x 8)
  resolution   a training step of 2 images over latent positions
  steps        sampling of 1 image with guidance over DDIM steps (latents 4 x 8 x 8)
  shards       building the index over shards of 500 samples
  processes    loading 1024 pictures over workers: CPU time of all processes together
  pictures     quality scores with 95 % intervals over generated pictures (1280-d, 2000 real ones)

Each size runs once in a round, in random order. The exponent p is that of the power law t = c n^p
which fits all medians, and `last` that of the two largest sizes: 1 is linear, 0 is constant.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks import harness

SERIES = {  # sizes, what they count, and those of a trial
    "batch": ((2, 4, 8, 16, 32), "images", (1, 2)),
    "resolution": ((64, 256, 1024, 4096), "latent positions", (64, 256)),
    "steps": ((2, 4, 8, 16, 32), "sampling steps", (1, 2)),
    "shards": ((2, 4, 8, 16, 32), "shards of 500 samples", (1, 2)),
    "processes": ((1, 2, 4), "workers", (1, 2)),
    "pictures": ((250, 500, 1000, 2000), "generated pictures", (16, 32)),
}
Work = Callable[[], float | None]  # runs once; returns its seconds if it measures itself


def main(words: list[str] | None = None) -> None:
    """Measures each series."""
    parser = harness.make_parser("scaling", __doc__, rounds=5)
    parser.add_argument("--only", choices=SERIES, help="one series")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the series, as PNG")
    args = harness.parse(parser, words)
    report, found = harness.Report(args), {}
    for name in [args.only] if args.only else SERIES:
        sizes, unit, small = SERIES[name]
        with tempfile.TemporaryDirectory() as folder:
            works = MAKERS[name](small if args.quick else sizes, Path(folder), args)
            seconds = harness.race(works, rounds=args.rounds, title=name)
        rows = [harness.summarize(size, values, unit="CPU s") for size, values in seconds.items()]
        found[name] = [{unit: row.pop("what"), **row} for row in rows]
        report.add(name, found[name])
    report.add("exponents", [{"series": name, **fit(rows)} for name, rows in found.items()])
    if args.picture:
        draw(found, args.picture)


def fit(rows: list[harness.Row]) -> dict[str, float]:
    """Returns the exponent over all sizes, and that of the last two."""
    sizes, seconds = [next(iter(row.values())) for row in rows], [row["CPU s"] for row in rows]
    exponent = harness.fit_exponent
    return {"exponent": exponent(sizes, seconds), "last": exponent(sizes[-2:], seconds[-2:])}


def make_steps(settings: dict[int, dict], folder: Path, args) -> dict[int, Work]:
    """Returns a training step of ours for each size, which changes the shape by its settings."""
    import torch

    from benchmarks.networks import SHAPES, compose_run, write_blank_shards
    from benchmarks.train_step import step_ours
    from ldm.config.run import build_job

    shape = SHAPES["tiny" if args.quick else "S"]
    works = {}
    for size, changes in settings.items():
        own = replace(shape, **changes)
        data = write_blank_shards(folder / f"data{size}", own.side)
        job = build_job(compose_run(own, data), folder / f"run{size}")
        images = torch.rand(own.batch, 3, own.side, own.side)
        works[size] = step_ours(job, images, [f"caption {i}" for i in range(own.batch)])
    return works


def make_batches(sizes: tuple[int, ...], folder: Path, args) -> dict[int, Work]:
    return make_steps({size: {"side": 8, "batch": size} for size in sizes}, folder, args)


def make_resolutions(sizes: tuple[int, ...], folder: Path, args) -> dict[int, Work]:
    settings = {size: {"side": round(size**0.5), "batch": 2} for size in sizes}
    return make_steps(settings, folder, args)


def make_samplings(sizes: tuple[int, ...], folder: Path, args) -> dict[int, Work]:
    import ldm
    from benchmarks.networks import SHAPES
    from benchmarks.sample import SCALE, train_one_step

    shape = replace(SHAPES["tiny" if args.quick else "S"], side=8)
    run = train_one_step(shape, folder)
    words = ("sampler=ddim", f"guidance.scale={SCALE}")
    pipeline = ldm.load(run, *words, trust="benchmarks").pipeline

    def paint(steps: int) -> None:
        pipeline(["a prompt"], seeds=[0], size=shape.side, steps=steps)

    return {size: partial(paint, size) for size in sizes}


def make_indices(sizes: tuple[int, ...], folder: Path, args) -> dict[int, Work]:
    import shutil

    from ldm.data.shards.reader import ShardReader, write_shard

    members = {"jpg": bytes(500), "txt": b"a caption"}
    one = folder / "one.tar"
    write_shard(one, [(f"{i:04}", members) for i in range(10 if args.quick else 500)])

    def index(place: Path) -> None:
        with harness.silence():
            ShardReader(str(place))

    index(folder)  # what it imports is no part of the measurement

    def build(shards: int) -> float:
        place = Path(tempfile.mkdtemp(dir=folder))
        for number in range(shards):
            (place / f"{number:05}.tar").hardlink_to(one)
        seconds = harness.run_forked(partial(index, place))
        shutil.rmtree(place)
        return seconds

    return {size: partial(build, size) for size in sizes}


def make_loadings(sizes: tuple[int, ...], folder: Path, args) -> dict[int, Work]:
    from benchmarks.data import BATCH, find_pictures, load_libraries, load_ours, write_shards

    pictures = find_pictures()[: 8 if args.quick else None]
    batches = max(sizes) if args.quick else 16
    load_libraries()
    shards = write_shards(folder / "256", pictures, 256, batches * BATCH)
    works = {size: partial(load_ours, shards, 64, size, batches) for size in sizes}
    return {size: partial(harness.run_forked, work) for size, work in works.items()}


def make_scores(sizes: tuple[int, ...], folder: Path, args) -> dict[int, Work]:
    from benchmarks.evaluation import prepare_scores

    real, width = (64, 16) if args.quick else (2000, 1280)
    works = {}
    for size in sizes:
        make, generated = prepare_scores("efficientnet", size, real, width)
        scores = make()
        works[size] = lambda scores=scores, generated=generated: harness.discard(
            scores.estimate_metrics(generated)
        )
    return works


MAKERS = {
    "batch": make_batches,
    "resolution": make_resolutions,
    "steps": make_samplings,
    "shards": make_indices,
    "processes": make_loadings,
    "pictures": make_scores,
}


def draw(found: dict[str, list[harness.Row]], path: Path) -> None:
    """Draws each series on logarithmic scales, with its power law, as PNG."""
    from matplotlib.figure import Figure

    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(4 * columns, 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (name, points) in zip(panels, found.items(), strict=False):
        sizes, seconds = [next(iter(row.values())) for row in points], [r["CPU s"] for r in points]
        exponent = harness.fit_exponent(sizes, seconds)
        middle = len(sizes) // 2
        line = [seconds[middle] * (size / sizes[middle]) ** exponent for size in sizes]
        axes.plot(sizes, line, "0.7", linewidth=1)
        axes.plot(sizes, seconds, "C0o")
        axes.set(xscale="log", yscale="log", xlabel=SERIES[name][1], ylabel="CPU seconds")
        axes.set_xticks(sizes, sizes)
        axes.set_xticks([], minor=True)
        axes.set_title(f"{name}: exponent {exponent:.2f}", loc="left", fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(panels):
        axes.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(path)


if __name__ == "__main__":
    main()
