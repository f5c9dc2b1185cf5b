"""python -m ldm.evaluate ckpt=runs/my-run [guidance.scale=1,2,4,8 features=[clip]]; see --help."""

import json
import shutil
import signal
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import hydra
from omegaconf import DictConfig

from ldm.config import command_line
from ldm.config.sample_options import check_places
from ldm.experiments import curves, evaluation_results, run_dir
from ldm.utils.errors import UsageError
from ldm.utils.files import located, reserve, write_text
from ldm.utils.text import often

TEXTS = ("ckpt", "images", "data", "others", "subset", "out", "keep", "autoencoder", "text_encoder")
VARIED = {  # what several values may be given for
    "run": ("guidance", "sampler", "steps"),
    "peer": ("guidance", "steps"),
    "images": (),
}
LIBRARIES = ("ldm", "torch", "torchmetrics", "transformers", "numpy", "pillow")


def main() -> None:
    """Compose, once for each point of a curve, then evaluate."""
    texts = command_line.take_text(TEXTS)
    choices = command_line.take_choices()

    @hydra.main(config_path=command_line.CONF, config_name="evaluate", version_base="1.3")
    def composed(cfg: DictConfig) -> None:
        asked = {**{name: cfg[name] for name in TEXTS}, **texts}
        points = command_line.points("evaluate", choices, may_vary=VARIED[kind(asked)])
        with command_line.told_plainly():
            evaluate(points, asked)

    if run_dir.launched() is None:  # torchrun ends its processes, also those that wait for another
        signal.signal(signal.SIGTERM, leave)
    command_line.run(composed, "evaluate", goes_on=True)


def leave(number: int, frame: object) -> None:
    """End as for Ctrl-C, with the exit code of a shell."""
    raise KeyboardInterrupt("stopped", 128 + number)


def kind(asked: dict[str, str | None]) -> str:
    """What is to be measured: "run" or "peer" (`ckpt`), or "images".

    Raises UsageError where neither or both are given, or there is no such folder.
    """
    if (asked["ckpt"] is None) == (asked["images"] is None):
        raise UsageError(
            "give ckpt=... (a run, a checkpoint, a folder of a diffusers pipeline) or images=... "
            "(a folder of pictures)"
        )
    if asked["images"] is None:
        is_peer = Path(asked["ckpt"]).joinpath("model_index.json").is_file()
        return "peer" if is_peer else "run"
    if asked["keep"] is not None:
        raise UsageError("keep=... is for pictures that are painted; those of images=... exist")
    return "images"


def evaluate(points: list[tuple[dict[str, str], DictConfig]], asked: dict[str, str | None]) -> None:
    """Measure each point: what differs from the others, and its configuration.

    One leaves metrics.json and prints a table; several leave curve_*.csv, .json and .png. What is
    painted waits as features beside the results until all is done.
    """
    check_places(points[0][1], *([] if asked["ckpt"] is None else [asked["ckpt"]]))

    from ldm.config import evaluation
    from ldm.evaluation.distributed import Ranks

    source = evaluation.source(points[0][1], asked, kind=kind(asked))
    out = located(asked["out"] or source.home)
    single = out.suffix == ".json"
    if single and len(points) > 1:
        raise UsageError(f"out={out} is a file, and a curve leaves three: give a folder")
    if asked["keep"] is not None and source.quality is None:
        raise UsageError("keep=... keeps what is painted for `features`, of which there is none")
    (out.parent if single else out).mkdir(parents=True, exist_ok=True)
    first, found, waiting = Ranks().rank == 0, [], []
    overwrite = points[0][1].overwrite
    if first and not overwrite:
        if not single:
            evaluation_results.check_place([varied for varied, _ in points], out)
        for varied, cfg in points if asked["keep"] else ():
            pieces = place_of(source, cfg, asked)[1]
            evaluation_results.check_kept(
                folder_of(asked["keep"], varied), going_on=pieces.is_dir()
            )
    for varied, cfg in points:
        if varied and first:
            print(told(varied), flush=True)
        facts, pieces = measured(source, cfg, varied, asked)
        found.append(facts)
        waiting.append(pieces)
    if not first:
        return
    if len(points) == 1:
        text = json.dumps(found[0], indent=2) + "\n"
        if single:
            with reserve(lambda n: [out.with_stem(out.stem + n)], overwrite=overwrite) as [path]:
                write_text(path, text)
            said = ""
        else:
            path = out / "metrics.json"
            said = evaluation_results.keep_former(path, found[0])
            write_text(path, text)
        print(f"{table(found[0])}\n{said}{path}")
    else:
        written = curves.write(found, out)
        print(f"{curves.table(found)}\n{'  '.join(map(str, written))}")
    for pieces in waiting:
        shutil.rmtree(pieces, ignore_errors=True)


def place_of(source, cfg: DictConfig, asked: dict[str, str | None]) -> tuple[dict, Path]:
    """What is known of a point before it is measured, and where its pieces wait."""
    from ldm.evaluation import tensor_cache

    known = {**source.facts(cfg), "device": device_name(source.device)}
    known["versions"] = {name: version(name) for name in LIBRARIES}
    if source.quality is not None:
        known["protocol"] = source.quality.facts()
    # Other settings, weights or pictures make other pieces.
    return known, source.home / "eval" / f"pieces-{tensor_cache.digest([known, asked['keep']])}"


def measured(
    source, cfg: DictConfig, varied: dict[str, str], asked: dict[str, str | None]
) -> tuple[dict, Path]:
    """All that is known of one point, as plain values, and where its pieces wait."""
    from tqdm import tqdm

    from ldm.evaluation.distributed import Ranks

    quality, ranks, home = source.quality, Ranks(), source.home / "eval"
    bar = partial(tqdm, unit="image", disable=ranks.rank != 0, mininterval=often())
    known, pieces = place_of(source, cfg, asked)
    if ranks.rank == 0 and pieces.is_dir():
        print(f"going on with what was painted before the last call ended ({pieces})", flush=True)
    elif ranks.rank == 0 and asked["keep"]:
        pieces.mkdir(parents=True)  # says that the pictures which are kept are of this call
    found = {"varied": varied} if varied else {}
    found["metrics"] = {}
    paint = source.paint(cfg)  # before a bar is drawn: it may have something to say
    if source.scenes is not None:
        with bar(total=share(len(source.scenes), ranks.world), desc="Scenes") as shown:
            found["metrics"] |= scene_metrics(source.scenes, paint, pieces, shown.update)
    if quality is not None:
        if ranks.rank == 0 and any(quality.subset.captions):
            quality.subset.save(home / f"subset-{quality.subset.digest}.json")
        with bar(desc="Reference") as shown:
            quality.prepare(source.device, done=lambda items: shown.update(len(items)))
        folder = asked["keep"] and folder_of(asked["keep"], varied)
        with bar(total=share(len(quality.subset), ranks.world), desc="Pictures") as shown:
            seen = quality.see(
                paint,
                folder=pieces / "features",
                done=lambda items: shown.update(len(items)),
                keep=partial(keep, folder, quality.subset)
                if folder
                else lambda items, images: None,
            )
        metrics, found["intervals"], found["floor"] = quality.estimate(seen)
        found["metrics"] |= metrics
    return {**found, **known}, pieces


def scene_metrics(
    scenes, paint: Callable, pieces: Path, done: Callable[[int], object]
) -> dict[str, float]:
    """SceneAccuracy's metrics; every process paints a share, and what is counted waits in `pieces`.

    `done(n)` is told how many pictures more are counted.
    """
    from torch import from_numpy

    from ldm.evaluation.feature_table import tabulate
    from ldm.evaluation.scenes.accuracy import NAMES, SUFFIXES

    batches = [*range(0, len(scenes), scenes.batch)]
    items = [range(first, min(first + scenes.batch, len(scenes))) for first in batches]
    found = tabulate(
        len(batches),
        lambda row: {"tally": from_numpy(scenes.tally(paint, items[row.start])).reshape(1, -1)},
        columns={"tally": len(SUFFIXES) * len(NAMES)},
        batch=1,
        folder=pieces / f"scenes-{scenes.batch}",
        done=lambda row: done(sum(len(items[i]) for i in row)),
    )
    counts = found["tally"].sum(dim=0).long().reshape(len(SUFFIXES), len(NAMES))
    return scenes.metrics(counts.numpy())


def share(count: int, world: int) -> int:
    """Pictures of one process, about."""
    return -(-count // world)


def told(varied: dict[str, str]) -> str:
    """What sets a point apart: guidance.scale=3, steps=10."""
    return ", ".join(f"{key}={value}" for key, value in varied.items())


def folder_of(keep: str, varied: dict[str, str]) -> Path:
    """Where the pictures of a point are kept."""
    return located(keep) / told(varied)


def device_name(device) -> str:
    """The accelerator, or cpu."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def keep(folder: Path, subset, items: range, images) -> None:
    """Each picture as a PNG named by its number in the subset, its caption beside it."""
    from PIL import Image

    from ldm.utils.images import save_png

    for i, image in zip(items, images.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
        facts = {"prompt": subset.captions[i], "seed": subset.seeds[i], "key": subset.keys[i]}
        path = folder / f"{i:07d}.png"
        save_png(Image.fromarray(image), path, facts)
        write_text(path.with_suffix(".txt"), subset.captions[i] + "\n")


def table(facts: dict) -> str:
    """How it was painted, then the metrics: scene accuracy, distances and scores."""
    blocks = [settings(facts["settings"])]
    if "scene_accuracy" in facts["metrics"]:
        blocks.append(scene_table(facts["metrics"]))
    if "protocol" in facts:
        blocks.append(image_table(facts))
    return "\n\n".join(blocks)


def settings(values: dict) -> str:
    """In one line: count 500, steps 30, sampler DDIM eta 0.0, .."""
    return ", ".join(f"{name} {spoken(value)}" for name, value in values.items())


def spoken(value: object) -> object:
    """A part's settings as its name and what they are; in brackets those of a part of it."""
    if not isinstance(value, dict):
        return value
    parts = {k: v for k, v in value.items() if k != "_target_" and v is not None}
    called = value.get("_target_", "").rpartition(".")[2]
    said = [f"{k} ({spoken(v)})" if isinstance(v, dict) else f"{k} {v}" for k, v in parts.items()]
    return " ".join([called, *said]).strip()


def image_table(facts: dict) -> str:
    """A row a metric: its value, the interval, what real pictures get, and what chance gets."""
    metrics, protocol = facts["metrics"], facts["protocol"]
    lines = [f"{'':<18}{'value':>10}{'95 % interval':>24}{'real':>10}{'chance':>10}"]
    for name, value in metrics.items():
        if name.startswith("scene_") or name.endswith(("_floor", "_real", "_chance")):
            continue
        low, high = facts["intervals"].get(name, (None, None))
        between = "" if low is None else f"{_short(low)} .. {_short(high)}"
        real = facts["floor"].get(name, metrics.get(f"{name}_real"))
        chance = metrics.get(f"{name}_chance")
        cells = ["" if number is None else _short(number) for number in (real, chance)]
        lines.append(f"{name:<18}{_short(value):>10}{between:>24}{cells[0]:>10}{cells[1]:>10}")
    lines.append(
        f"{protocol['painted']} pictures against {protocol['real']} real ones; the column real is "
        f"of the real pictures of {protocol['floor']} of these captions"
    )
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:.4g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"


def scene_table(metrics: dict[str, float]) -> str:
    """A row for the whole caption and for each attribute; columns seen, unseen and chance."""
    from ldm.evaluation.scenes.accuracy import NAMES, SUFFIXES

    lines = [f"{'':<14}{'seen':>8}{'unseen':>8}{'chance':>8}"]
    for name in NAMES:
        values = [f"{metrics[f'scene_{name}{suffix}']:8.3f}" for suffix in SUFFIXES]
        lines.append(f"{'whole caption' if name == 'accuracy' else name:<14}{''.join(values)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
