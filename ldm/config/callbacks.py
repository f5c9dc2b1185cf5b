"""Configuration to the callbacks of a run: its own, those of `eval`, and the user's."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ldm.config.components import build_feature_extractors
from ldm.config.own_components import DIFFUSION_GROUPS
from ldm.config.reserved_settings import OUR_EVALUATIONS
from ldm.config.sample_options import print_to_stderr
from ldm.data.datamodule import TextImageData
from ldm.evaluation.image_metrics import ImageMetric
from ldm.experiments.run_dir import get_launcher_rank
from ldm.inference.generate import generate_task_examples
from ldm.inference.pipeline import Pipeline
from ldm.training.callbacks.checkpointing import Checkpoints
from ldm.training.callbacks.monitoring import (
    ProgressBar,
    RandomLayerSeeding,
    SampleImages,
    StepCounter,
    ThroughputMonitor,
)
from ldm.training.callbacks.nonfinite import NonFiniteStepSkipper
from ldm.training.callbacks.preemption import PreemptionHandler
from ldm.training.callbacks.profiling import StepProfiler
from ldm.training.callbacks.resume_report import ResumeReport
from ldm.utils.errors import UsageError
from ldm.utils.signals import StopSignals

# The groups that decide what a generated image looks like.
GENERATION_GROUPS = (*DIFFUSION_GROUPS, "sampler", "guidance")


def build_sample_callbacks(
    cfg: DictConfig, pipeline: Pipeline, data: TextImageData, run_dir: Path
) -> list[L.Callback]:
    """SampleImages, unless there are no prompts; prints the warnings of the pipeline."""
    prompts = cfg.samples.prompts or data.val_captions(cfg.samples.n)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if get_launcher_rank() == 0:
        evals = (check.get("steps") for check in (cfg.eval or {}).values())
        counts = {cfg.samples.steps, *(count for count in evals if count is not None)}
        for line in (line for count in sorted(counts) for line in pipeline.collect_warnings(count)):
            print_to_stderr(line)
    if cfg.samples.n == 0 or not prompts:
        return []
    settings = {"steps": cfg.samples.steps, "seed": cfg.seed}
    draw = partial(generate_task_examples, pipeline, data.val_set, prompts, **settings)
    return [SampleImages(run_dir / "samples", draw)]


def build_evaluation_callbacks(
    cfg: DictConfig,
    pipeline: Pipeline,
    denoiser: nn.Module,
    data: TextImageData,
    run_dir: Path,
    metrics: Mapping[str, ImageMetric],
) -> list[L.Callback]:
    """The measurements of `cfg.eval`; ours are none for tasks that start from images."""
    found, task = dict(cfg.eval or {}), pipeline.components.task
    scenes, quality = (found.pop(name, None) for name in OUR_EVALUATIONS)
    callbacks = []
    if task.needs_image:
        if (scenes or quality) and get_launcher_rank() == 0:
            print(f"eval: task={task.name} starts from an image, so only val/loss is measured")
        scenes = quality = None
    # Passed to the call: instantiate would take apart what is a dataclass or a dictionary.
    build = partial(instantiate, _partial_=True, _convert_="all")
    if scenes:
        callbacks.append(build(scenes)(pipeline, size=data.size))
    if quality:
        settings = OmegaConf.to_container(cfg, resolve=True)
        settings = {name: settings[name] for name in GENERATION_GROUPS}
        measurement = build(quality)(
            pipeline,
            build_feature_extractors(cfg),
            images=data.val_set.without_augmentation(),
            reference_images=data.train_set.without_augmentation(),
            size=data.size,
            folder=run_dir / "eval",
            raw_denoiser=denoiser,
            metrics=metrics,
            settings=json.dumps({"dtype": str(pipeline.dtype), **settings}, sort_keys=True),
        )
        callbacks.append(measurement)
    for name, node in found.items():
        built = build(node)(pipeline=pipeline, data=data, folder=run_dir / "eval" / name)
        callbacks.append(check_is_callback(built, f"eval.{name}"))
    return callbacks


def build_own_callbacks(cfg: DictConfig) -> list[L.Callback]:
    """The callbacks of the group `callbacks`; UsageError for anything else in it."""
    return [
        check_is_callback(instantiate(node, _convert_="all"), f"callbacks.{name}")
        for name, node in (cfg.callbacks or {}).items()
    ]


def check_is_callback(built: object, setting: str) -> L.Callback:
    """Returns a callback of Lightning; UsageError for what is none."""
    if isinstance(built, L.Callback):
        return built
    kind = f"{type(built).__module__}.{type(built).__qualname__}"
    raise UsageError(
        f"{setting} is a {kind}, and no callback: its class derives from lightning.Callback "
        "(of the package lightning, not pytorch_lightning)"
    )


def build_callbacks(
    cfg: DictConfig,
    run_dir: Path,
    callbacks: Sequence[L.Callback],
    monitor: ThroughputMonitor,
    facts: dict,
    signals: StopSignals | None,
) -> list[L.Callback]:
    """The callbacks of a stage among those of every run, in the order in which they are called."""
    best = {"metric": cfg.metric, "direction": cfg.direction}
    skipper = NonFiniteStepSkipper(
        run_dir / "bad_batches.json", monitor=monitor, stop_after=cfg.stop_after_skips
    )
    checkpoints = Checkpoints(
        run_dir / "checkpoints", **cfg.checkpoint, **best, facts=facts, skipper=skipper
    )
    stop = {"every": monitor.every, "max_hours": cfg.trainer.max_hours, "signals": signals}
    has_own = cfg.callbacks or (cfg.eval and set(cfg.eval).difference(OUR_EVALUATIONS))
    return [
        monitor,
        RandomLayerSeeding(cfg.seed, cfg.rng),
        ProgressBar(monitor),
        skipper,
        *([StepCounter()] if has_own else []),
        *([StepProfiler(run_dir / "profile")] if cfg.get("profile") else []),
        *callbacks,
        checkpoints,
        ResumeReport(),
        PreemptionHandler(checkpoints.save_now, **stop),
        *([instantiate(cfg.early_stop)] if cfg.early_stop else []),
    ]
