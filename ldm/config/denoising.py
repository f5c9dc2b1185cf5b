"""Configuration to a denoiser in training: its parts first, then, with the data, its module."""

import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ldm.config.components import (
    FROZEN_GROUPS,
    STYLE_GROUP,
    Components,
    build_denoiser,
    build_frozen_encoders,
    build_objective,
    build_style_encoder,
    get_autocast_dtype,
    warm_start_from_run,
)
from ldm.config.guidance import build_guidance
from ldm.config.sample_options import print_to_stderr
from ldm.config.stages import check_captions_readable, check_data_kind, check_image_size
from ldm.data.datamodule import TextImageData
from ldm.diffusion.objective import Objective
from ldm.experiments.run_dir import get_launcher_rank
from ldm.inference.generate import generate_task_examples
from ldm.inference.pipeline import Pipeline
from ldm.models.temporal import FramewiseAutoencoder
from ldm.training.callbacks.ema_snapshots import EMASnapshots
from ldm.training.callbacks.monitoring import SampleImages
from ldm.training.modules.diffusion import LatentDiffusion
from ldm.utils.checkpoint_file import find_newest_checkpoint
from ldm.utils.errors import UsageError

# Groups that decide what a picture looks like.
GENERATION_GROUPS = [
    *FROZEN_GROUPS,
    "model",
    "scheduler",
    "objective",
    "task",
    "sampler",
    "guidance",
]


@dataclass(frozen=True)
class TrainingComponents:
    """All of a denoiser's training that needs no data."""

    frozen: dict[str, nn.Module]
    objective: Objective
    task: object
    network: nn.Module


def build_training_components(cfg: DictConfig, run_dir: Path) -> TrainingComponents:
    """The parts, which go together; a new run's network begins with `cfg.init`.

    Raises UsageError and ValueError for what does not.
    """
    task = instantiate(cfg.task)
    if task.sampling_only:
        raise UsageError(
            f"task={task.name} is a way of sampling from any run of text to image, and nothing to "
            f"train: leave it out here, then give `python sample.py ckpt=... task={task.name}`"
        )
    check_data_kind(cfg, f"task={task.name}", temporal=task.is_video)
    if task.is_video and cfg.style_encoder:
        raise UsageError(f"task={task.name} takes no style pictures: leave style_encoder=.. out")
    task.check_size(cfg.data.size)
    autoencoder, text = build_frozen_encoders(cfg)
    frozen, style = ({"autoencoder": autoencoder, "text_encoder": text}, build_style_encoder(cfg))
    if style is not None:
        frozen[STYLE_GROUP] = style
    objective = build_objective(cfg)
    network = build_denoiser(cfg, autoencoder, text, task, style)
    check_image_size(cfg.data.size, autoencoder.factor * network.multiple)
    if cfg.init is not None and find_newest_checkpoint(run_dir / "checkpoints") is None:
        told = warm_start_from_run(cfg.init, network, frozen, objective.schedule)
        if get_launcher_rank() == 0:
            print(told, flush=True)
    return TrainingComponents(frozen, objective, task, network)


def build_diffusion_module(
    components: TrainingComponents, cfg: DictConfig, data: TextImageData, run_dir: Path
) -> tuple[LatentDiffusion, list[L.Callback], dict[str, nn.Module]]:
    """LatentDiffusion with its sample pictures, and the frozen parts it rests on."""
    objective, task = components.objective, components.task
    autoencoder, text = (components.frozen[name] for name in FROZEN_GROUPS)
    style = components.frozen.get(STYLE_GROUP)
    check_captions_readable(text, data)
    autoencoder = autoencoder if data.frames is None else FramewiseAutoencoder(autoencoder)
    trained = LatentDiffusion(
        components.network,
        autoencoder,
        text,
        objective,
        task,
        optimizer=instantiate(cfg.optimizer),
        ema_decay=cfg.ema_decay,
        phema_lengths=cfg.phema.lengths,
        caption_dropout=cfg.caption_dropout,
        validate_raw=cfg.validate_raw,
        style_encoder=style,
        seed=cfg.seed,
    )
    gpu = cfg.trainer.accelerator != "cpu" and torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if gpu else "cpu")
    pipeline = Pipeline(
        trained.ema.module,
        autoencoder=autoencoder,
        text_encoder=text,
        objective=objective,
        task=task,
        sampler=instantiate(cfg.sampler),
        guidance=build_guidance(
            cfg.guidance, Components(autoencoder, text, objective, task, device)
        ),
        dtype=get_autocast_dtype(cfg.trainer.get("precision"))
        if gpu
        else None,  # as pipelines.restore
        trained_size=data.size,
        num_frames=data.frames,
        style_encoder=style,
    )
    asked = cfg.samples.prompts or data.val_captions(cfg.samples.n)
    prompts = [asked] if isinstance(asked, str) else list(asked)
    if cfg.samples.n == 0:
        prompts = []
    draw = partial(
        generate_task_examples,
        pipeline,
        data.val_set,
        prompts,
        steps=cfg.samples.steps,
        seed=cfg.seed,
    )
    if get_launcher_rank() == 0:
        counts = {cfg.samples.steps, *(each.steps for each in (cfg.eval or {}).values())}
        for line in (line for count in sorted(counts) for line in pipeline.collect_warnings(count)):
            print_to_stderr(line)
    callbacks = [SampleImages(run_dir / "samples", draw)] if prompts else []
    if trained.phema is not None:
        callbacks.append(EMASnapshots(run_dir / "phema", every=cfg.phema.every))
    if task.needs_image and cfg.eval and get_launcher_rank() == 0:
        print(f"eval: task={task.name} begins with a picture, so val/loss alone is measured")
    if "scenes" in cfg.eval and not task.needs_image:
        callbacks.append(instantiate(cfg.eval.scenes, pipeline, size=data.size))
    if "images" in cfg.eval and not task.needs_image:
        networks = [instantiate(network) for network in cfg.features.values()]
        seen = {
            "images": data.val_set,
            "reference_images": data.train_set.without_augmentation(),
            "size": data.size,
        }
        place = {"folder": run_dir / "eval", "raw_denoiser": trained.denoiser}
        whole = OmegaConf.to_container(cfg, resolve=True)
        painted = {
            "dtype": str(pipeline.dtype),
            **{name: whole[name] for name in GENERATION_GROUPS},
        }
        place["settings"] = json.dumps(painted, sort_keys=True)
        callbacks.append(instantiate(cfg.eval.images, pipeline, networks, **seen, **place))
    return trained, callbacks, components.frozen
