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
from ldm.config.command_line import (
    compose_combinations,
    convert_to_usage_errors,
    pop_sweep_choices,
    pop_text_options,
    run_command,
)
from ldm.config.sample_options import check_checkpoints_and_device
from ldm.experiments.curves import format_curve_table, write_curve
from ldm.experiments.evaluation_results import (
    check_image_folder,
    check_result_location,
    rename_former_metrics,
)
from ldm.experiments.run_dir import get_launcher_layout
from ldm.utils.errors import UsageError
from ldm.utils.files import reserve_files, resolve_path, write_text
from ldm.utils.text import get_progress_interval

EVALUATE_TEXT_OPTIONS = (
    "ckpt",
    "images",
    "data",
    "others",
    "subset",
    "out",
    "keep",
    "autoencoder",
    "text_encoder",
)
VARIABLE_GROUPS = {  # what several values may be given for
    "run": ("guidance", "sampler", "steps"),
    "peer": ("guidance", "steps"),
    "images": (),
}
EVALUATE_LIBRARIES = ("ldm", "torch", "torchmetrics", "transformers", "numpy", "pillow")


def main() -> None:
    """Compose, once for each point of a curve, then evaluate."""
    texts = pop_text_options(EVALUATE_TEXT_OPTIONS)
    choices = pop_sweep_choices()

    @hydra.main(config_path=command_line.CONF_DIR, config_name="evaluate", version_base="1.3")
    def composed(cfg: DictConfig) -> None:
        asked = {**{name: cfg[name] for name in EVALUATE_TEXT_OPTIONS}, **texts}
        points = compose_combinations(
            "evaluate", choices, may_vary=VARIABLE_GROUPS[choose_source_kind(asked)]
        )
        with convert_to_usage_errors():
            evaluate_points(points, asked)

    if (
        get_launcher_layout() is None
    ):  # torchrun ends its processes, also those that wait for another
        signal.signal(signal.SIGTERM, raise_keyboard_interrupt)
    run_command(composed, "evaluate", resumable=True)


def raise_keyboard_interrupt(number: int, frame: object) -> None:
    """End as for Ctrl-C, with the exit code of a shell."""
    raise KeyboardInterrupt("stopped", 128 + number)


def choose_source_kind(options: dict[str, str | None]) -> str:
    """What is to be measured: "run" or "peer" (`ckpt`), or "images".

    Raises UsageError where neither or both are given, or there is no such folder.
    """
    if (options["ckpt"] is None) == (options["images"] is None):
        raise UsageError(
            "give ckpt=... (a run, a checkpoint, a folder of a diffusers pipeline) or images=... "
            "(a folder of pictures)"
        )
    if options["images"] is None:
        is_peer = Path(options["ckpt"]).joinpath("model_index.json").is_file()
        return "peer" if is_peer else "run"
    if options["keep"] is not None:
        raise UsageError("keep=... is for pictures that are painted; those of images=... exist")
    return "images"


def evaluate_points(
    points: list[tuple[dict[str, str], DictConfig]], options: dict[str, str | None]
) -> None:
    """Measure each point: what differs from the others, and its configuration.

    One leaves metrics.json and prints a table; several leave curve_*.csv, .json and .png. What is
    painted waits as features beside the results until all is done.
    """
    check_checkpoints_and_device(
        points[0][1], *([] if options["ckpt"] is None else [options["ckpt"]])
    )

    from ldm.config.evaluation import build_evaluation_source
    from ldm.evaluation.distributed import ProcessGroup

    source = build_evaluation_source(points[0][1], options, kind=choose_source_kind(options))
    out = resolve_path(options["out"] or source.home)
    single = out.suffix == ".json"
    if single and len(points) > 1:
        raise UsageError(f"out={out} is a file, and a curve leaves three: give a folder")
    if options["keep"] is not None and source.quality is None:
        raise UsageError("keep=... keeps what is painted for `features`, of which there is none")
    (out.parent if single else out).mkdir(parents=True, exist_ok=True)
    first, found, waiting = ProcessGroup().rank == 0, [], []
    overwrite = points[0][1].overwrite
    if first and not overwrite:
        if not single:
            check_result_location([varied for varied, _ in points], out)
        for varied, cfg in points if options["keep"] else ():
            pieces = describe_point(source, cfg, options)[1]
            check_image_folder(
                locate_point_images(options["keep"], varied), going_on=pieces.is_dir()
            )
    for varied, cfg in points:
        if varied and first:
            print(format_point(varied), flush=True)
        facts, pieces = measure_point(source, cfg, varied, options)
        found.append(facts)
        waiting.append(pieces)
    if not first:
        return
    if len(points) == 1:
        text = json.dumps(found[0], indent=2) + "\n"
        if single:
            with reserve_files(lambda n: [out.with_stem(out.stem + n)], overwrite=overwrite) as [
                path
            ]:
                write_text(path, text)
            said = ""
        else:
            path = out / "metrics.json"
            said = rename_former_metrics(path, found[0])
            write_text(path, text)
        print(f"{format_evaluation(found[0])}\n{said}{path}")
    else:
        written = write_curve(found, out)
        print(f"{format_curve_table(found)}\n{'  '.join(map(str, written))}")
    for pieces in waiting:
        shutil.rmtree(pieces, ignore_errors=True)


def describe_point(source, cfg: DictConfig, options: dict[str, str | None]) -> tuple[dict, Path]:
    """What is known of a point before it is measured, and where its pieces wait."""
    from ldm.evaluation.tensor_cache import hash_facts

    known = {**source.facts(cfg), "device": format_device_name(source.device)}
    known["versions"] = {name: version(name) for name in EVALUATE_LIBRARIES}
    if source.quality is not None:
        known["protocol"] = source.quality.facts()
    # Other settings, weights or pictures make other pieces.
    return known, source.home / "eval" / f"pieces-{hash_facts([known, options['keep']])}"


def measure_point(
    source, cfg: DictConfig, varied: dict[str, str], options: dict[str, str | None]
) -> tuple[dict, Path]:
    """All that is known of one point, as plain values, and where its pieces wait."""
    from tqdm import tqdm

    from ldm.evaluation.distributed import ProcessGroup

    quality, ranks, home = source.quality, ProcessGroup(), source.home / "eval"
    bar = partial(tqdm, unit="image", disable=ranks.rank != 0, mininterval=get_progress_interval())
    known, pieces = describe_point(source, cfg, options)
    if ranks.rank == 0 and pieces.is_dir():
        print(f"going on with what was painted before the last call ended ({pieces})", flush=True)
    elif ranks.rank == 0 and options["keep"]:
        pieces.mkdir(parents=True)  # says that the pictures which are kept are of this call
    found = {"varied": varied} if varied else {}
    found["metrics"] = {}
    paint = source.generate(cfg)  # before a bar is drawn: it may have something to say
    if source.scenes is not None:
        with bar(
            total=count_images_per_rank(len(source.scenes), ranks.world_size), desc="Scenes"
        ) as shown:
            found["metrics"] |= measure_scene_accuracy(source.scenes, paint, pieces, shown.update)
    if quality is not None:
        if ranks.rank == 0 and any(quality.subset.captions):
            quality.subset.save(home / f"subset-{quality.subset.digest}.json")
        with bar(desc="Reference") as shown:
            quality.prepare(source.device, done=lambda items: shown.update(len(items)))
        folder = options["keep"] and locate_point_images(options["keep"], varied)
        with bar(
            total=count_images_per_rank(len(quality.subset), ranks.world_size), desc="Pictures"
        ) as shown:
            seen = quality.extract_features(
                paint,
                folder=pieces / "features",
                done=lambda items: shown.update(len(items)),
                on_images=partial(save_point_images, folder, quality.subset)
                if folder
                else lambda items, images: None,
            )
        metrics, found["intervals"], found["floor"] = quality.estimate(seen)
        found["metrics"] |= metrics
    return {**found, **known}, pieces


def measure_scene_accuracy(
    scenes, generate: Callable, pieces: Path, done: Callable[[int], object]
) -> dict[str, float]:
    """SceneAccuracy's metrics; every process paints a share, and what is counted waits in `pieces`.

    `done(n)` is told how many pictures more are counted.
    """
    from torch import from_numpy

    from ldm.evaluation.feature_table import tabulate
    from ldm.evaluation.scenes.accuracy import METRIC_SUFFIXES, SCENE_METRICS

    batches = [*range(0, len(scenes), scenes.batch)]
    items = [range(first, min(first + scenes.batch, len(scenes))) for first in batches]
    found = tabulate(
        len(batches),
        lambda row: {"tally": from_numpy(scenes.tally(generate, items[row.start])).reshape(1, -1)},
        columns={"tally": len(METRIC_SUFFIXES) * len(SCENE_METRICS)},
        batch=1,
        folder=pieces / f"scenes-{scenes.batch}",
        done=lambda row: done(sum(len(items[i]) for i in row)),
    )
    counts = found["tally"].sum(dim=0).long().reshape(len(METRIC_SUFFIXES), len(SCENE_METRICS))
    return scenes.metrics(counts.numpy())


def count_images_per_rank(count: int, world: int) -> int:
    """Pictures of one process, about."""
    return -(-count // world)


def format_point(varied: dict[str, str]) -> str:
    """What sets a point apart: guidance.scale=3, steps=10."""
    return ", ".join(f"{key}={value}" for key, value in varied.items())


def locate_point_images(keep: str, varied: dict[str, str]) -> Path:
    """Where the pictures of a point are kept."""
    return resolve_path(keep) / format_point(varied)


def format_device_name(device) -> str:
    """The accelerator, or cpu."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def save_point_images(folder: Path, subset, items: range, images) -> None:
    """Each picture as a PNG named by its number in the subset, its caption beside it."""
    from PIL import Image

    from ldm.utils.images import save_png

    for i, image in zip(items, images.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
        facts = {"prompt": subset.captions[i], "seed": subset.seeds[i], "key": subset.keys[i]}
        path = folder / f"{i:07d}.png"
        save_png(Image.fromarray(image), path, facts)
        write_text(path.with_suffix(".txt"), subset.captions[i] + "\n")


def format_evaluation(facts: dict) -> str:
    """How it was painted, then the metrics: scene accuracy, distances and scores."""
    blocks = [format_evaluation_settings(facts["settings"])]
    if "scene_accuracy" in facts["metrics"]:
        blocks.append(format_scene_table(facts["metrics"]))
    if "protocol" in facts:
        blocks.append(format_image_table(facts))
    return "\n\n".join(blocks)


def format_evaluation_settings(values: dict) -> str:
    """In one line: count 500, steps 30, sampler DDIM eta 0.0, .."""
    return ", ".join(f"{name} {format_setting(value)}" for name, value in values.items())


def format_setting(value: object) -> object:
    """A part's settings as its name and what they are; in brackets those of a part of it."""
    if not isinstance(value, dict):
        return value
    parts = {k: v for k, v in value.items() if k != "_target_" and v is not None}
    called = value.get("_target_", "").rpartition(".")[2]
    said = [
        f"{k} ({format_setting(v)})" if isinstance(v, dict) else f"{k} {v}"
        for k, v in parts.items()
    ]
    return " ".join([called, *said]).strip()


def format_image_table(facts: dict) -> str:
    """A row a metric: its value, the interval, what real pictures get, and what chance gets."""
    metrics, protocol = facts["metrics"], facts["protocol"]
    lines = [f"{'':<18}{'value':>10}{'95 % interval':>24}{'real':>10}{'chance':>10}"]
    for name, value in metrics.items():
        if name.startswith("scene_") or name.endswith(("_floor", "_real", "_chance")):
            continue
        low, high = facts["intervals"].get(name, (None, None))
        between = "" if low is None else f"{_format_metric(low)} .. {_format_metric(high)}"
        real = facts["floor"].get(name, metrics.get(f"{name}_real"))
        chance = metrics.get(f"{name}_chance")
        cells = ["" if number is None else _format_metric(number) for number in (real, chance)]
        lines.append(
            f"{name:<18}{_format_metric(value):>10}{between:>24}{cells[0]:>10}{cells[1]:>10}"
        )
    lines.append(
        f"{protocol['painted']} pictures against {protocol['real']} real ones; the column real is "
        f"of the real pictures of {protocol['floor']} of these captions"
    )
    return "\n".join(lines)


def _format_metric(value: float) -> str:
    return f"{value:.4g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"


def format_scene_table(metrics: dict[str, float]) -> str:
    """A row for the whole caption and for each attribute; columns seen, unseen and chance."""
    from ldm.evaluation.scenes.accuracy import METRIC_SUFFIXES, SCENE_METRICS

    lines = [f"{'':<14}{'seen':>8}{'unseen':>8}{'chance':>8}"]
    for name in SCENE_METRICS:
        values = [f"{metrics[f'scene_{name}{suffix}']:8.3f}" for suffix in METRIC_SUFFIXES]
        lines.append(f"{'whole caption' if name == 'accuracy' else name:<14}{''.join(values)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
