"""Measures a run, a pipeline of diffusers or images, and writes the results."""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ldm.config.adoption import adopt_published_sampler
from ldm.config.composition import list_task_words
from ldm.config.published import PIPELINE_FILE, is_foreign_pipeline
from ldm.config.reserved_settings import UNREAD_SETTINGS
from ldm.config.sample_options import LOCATION_SETTINGS, check_checkpoints_and_device
from ldm.experiments.curves import write_curve
from ldm.experiments.evaluation_results import (
    check_image_folder,
    check_result_location,
    save_point_images,
    write_evaluation,
)
from ldm.training.loggers.evaluation_log import find_logged_run, log_evaluation
from ldm.utils.errors import UsageError
from ldm.utils.files import resolve_path
from ldm.utils.text import get_progress_interval

EVALUATE_TEXT_OPTIONS = (
    *("ckpt", "images", "data", "others", "subset", "out", "keep"),
    *LOCATION_SETTINGS,
)
EVALUATE_LIBRARIES = ("ldm", "torch", "torchmetrics", "transformers", "numpy", "pillow")
EvaluationPoint = tuple[dict[str, str], DictConfig]  # what differs from other points; all settings


@dataclass(frozen=True)
class EvaluationRecord:
    """The results of all points, the files that hold them, and what became of former ones."""

    results: list[dict]
    files: Sequence[Path]
    note: str = ""


def choose_source_kind(options: dict[str, str | None], backend: str | None = None) -> str:
    """Returns what is measured: "run" or "peer" (`ckpt`), or "images"; UsageError if unclear.

    backend: what generates the images of a diffusers folder; None: ldm where it opens the folder.
    """
    ckpt = options["ckpt"]
    if (ckpt is None) == (options["images"] is None):
        raise UsageError(
            "give ckpt=... (a run, a checkpoint, a folder of a diffusers pipeline) or images=... "
            "(a folder of images)"
        )
    if options["images"] is None:
        if backend != "diffusers" and (backend == "ldm" or not is_foreign_pipeline(ckpt)):
            return "run"
        if not Path(ckpt, PIPELINE_FILE).is_file():
            raise UsageError(f"backend=diffusers: {ckpt} is no folder of a diffusers pipeline")
        return "peer"
    if options["keep"] is not None:
        raise UsageError("keep=... saves generated images; those of images=... are files already")
    return "images"


def check_settings_are_read(kind: str, words: Iterable[str]) -> None:
    """UsageError for a setting of the command line that says nothing of this kind of source."""
    for word in words:
        key = word.lstrip("+~").partition("=")[0].partition(".")[0]
        if key in UNREAD_SETTINGS[kind]:
            whose = "image files" if kind == "images" else "a pipeline of diffusers"
            raise UsageError(f"{word}: {key} is not read for {whose}: leave it out")


def record_evaluation(
    points: list[EvaluationPoint],
    options: dict[str, str | None],
    words: Sequence[str] | None = None,
) -> EvaluationRecord | None:
    """Measures each point; writes metrics.json for one, curve_*.csv, .json, .png for several.

    Features of generated images wait in a folder next to the results until all points are done.
    words: of the command; None: those of this process. Returns None in all processes but the first.
    """
    overwrite, ckpt, keep = points[0][1].overwrite, options["ckpt"], options["keep"]
    check_checkpoints_and_device(points[0][1], *([] if ckpt is None else [ckpt]))
    logged_run = find_logged_run(ckpt) if points[0][1].log else None
    kind = choose_source_kind(options, points[0][1].backend)
    for varied, cfg in points if kind == "run" else ():
        given = [*(list_task_words() if words is None else words), *(f"{key}=" for key in varied)]
        adopt_published_sampler(cfg, ckpt, given, quiet=cfg is not points[0][1])

    from ldm.config.evaluation import build_evaluation_source
    from ldm.evaluation.distributed import ProcessGroup

    source = build_evaluation_source(points[0][1], options, kind=kind)
    out = resolve_path(options["out"] or source.home)
    single = out.suffix == ".json"
    if single and len(points) > 1:
        raise UsageError(f"out={out} is a file, and a curve has three files: give a folder")
    if keep is not None and source.quality is None:
        raise UsageError("keep=... saves images generated for `features`, and there are none")
    (out.parent if single else out).mkdir(parents=True, exist_ok=True)
    first = ProcessGroup().rank == 0
    if first and not overwrite:
        if not single:
            check_result_location([varied for varied, _ in points], out)
        for varied, cfg in points if keep else ():
            is_continued = describe_point(source, cfg, options)[1].is_dir()
            check_image_folder(locate_point_images(keep, varied), going_on=is_continued)
    results, waiting = [], []
    for varied, cfg in points:
        if varied and first:
            print(format_point(varied), flush=True)
        facts, pieces = measure_point(source, cfg, varied, options)
        results.append(facts)
        waiting.append(pieces)
    if not first:
        return None
    if len(points) == 1:
        path, note = write_evaluation(results[0], out, overwrite=overwrite)
        record = EvaluationRecord(results, [path], note)
    else:
        record = EvaluationRecord(results, write_curve(results, out))
    for pieces in waiting:
        shutil.rmtree(pieces, ignore_errors=True)
    if logged_run is not None:
        log_evaluation(logged_run, source, points, results)
    return record


def describe_point(source, cfg: DictConfig, options: dict[str, str | None]) -> tuple[dict, Path]:
    """Returns the facts of a point before it is measured, and the folder where its pieces wait."""
    from ldm.evaluation.tensor_cache import hash_facts

    facts = {**source.facts(cfg), "device": format_device_name(source.device)}
    facts["versions"] = {name: version(name) for name in EVALUATE_LIBRARIES}
    if source.quality is not None:
        facts["protocol"] = source.quality.facts()
    if cfg.metrics:
        facts["settings"] |= {"metrics": OmegaConf.to_container(cfg.metrics)}
    # Other settings, weights or images make other pieces.
    return facts, source.home / "eval" / f"pieces-{hash_facts([facts, options['keep']])}"


def measure_point(
    source, cfg: DictConfig, varied: dict[str, str], options: dict[str, str | None]
) -> tuple[dict, Path]:
    """Returns the results of one point, as plain values, and the folder where its pieces wait."""
    from tqdm.auto import tqdm

    from ldm.evaluation.distributed import ProcessGroup
    from ldm.evaluation.scenes.accuracy import measure_scene_accuracy

    quality, ranks, keep = source.quality, ProcessGroup(), options["keep"]
    bar = partial(tqdm, unit="image", disable=ranks.rank != 0, mininterval=get_progress_interval())
    facts, pieces = describe_point(source, cfg, options)
    if ranks.rank == 0 and pieces.is_dir():
        print(f"continues with what the last call has generated ({pieces})", flush=True)
    elif ranks.rank == 0 and keep:
        pieces.mkdir(parents=True)  # says that the saved images belong to this call
    results = {"varied": varied} if varied else {}
    results["metrics"] = {}
    generate = source.generate(cfg)  # before a bar is drawn: it may print a warning
    if source.scenes is not None:
        total = -(-len(source.scenes) // ranks.world_size)
        with bar(total=total, desc="Scenes") as progress:
            folder = pieces / f"scenes-{source.scenes.batch}"
            results["metrics"] |= measure_scene_accuracy(
                source.scenes, generate, folder=folder, done=progress.update
            )
    if quality is not None:
        if ranks.rank == 0 and any(quality.subset.captions):
            quality.subset.save(source.home / "eval" / f"subset-{quality.subset.digest}.json")
        with bar(desc="Reference") as progress:
            quality.prepare(source.device, done=lambda items: progress.update(len(items)))
        more = {}
        if keep:
            folder = locate_point_images(keep, varied)
            more["on_images"] = partial(save_point_images, folder, quality.subset)
        total = -(-len(quality.subset) // ranks.world_size)
        with bar(total=total, desc="Images") as progress:
            features = quality.extract_features(
                generate,
                folder=pieces / "features",
                done=lambda items: progress.update(len(items)),
                **more,
            )
        metrics, results["intervals"], results["floor"] = quality.estimate(features)
        results["metrics"] |= metrics
    return {**results, **facts}, pieces


def format_point(varied: dict[str, str]) -> str:
    """Returns the settings of a point that vary: guidance.scale=3, steps=10."""
    return ", ".join(f"{key}={value}" for key, value in varied.items())


def locate_point_images(keep: str, varied: dict[str, str]) -> Path:
    """Returns the folder for the images of a point."""
    return resolve_path(keep) / format_point(varied)


def format_device_name(device) -> str:
    """Returns the accelerator's name, or cpu."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
