"""A checkpoint to a pipeline: networks from the file, sampling from the configuration."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ldm.config.components import (
    FROZEN_GROUPS,
    STYLE_GROUP,
    Components,
    build_frozen_encoders,
    build_objective,
    build_style_encoder,
    get_autocast_dtype,
    load_diffusion_checkpoint,
    set_component_location,
)
from ldm.config.devices import select_device
from ldm.config.guidance import build_guidance
from ldm.inference.pipeline import Pipeline
from ldm.models.temporal import FramewiseAutoencoder
from ldm.utils.checkpoint_file import CheckpointError
from ldm.utils.errors import UsageError
from ldm.utils.hashing import hash_module

TRAIN_TASK_HINT = "Train one: python train.py task={task} init={ckpt} name=my-{task}"
CLASSIFIER_FREE_TARGET = "ldm.diffusion.guidance.cfg.ClassifierFreeGuidance"
COMPOSITIONAL_TARGET = "ldm.diffusion.guidance.compositional.CompositionalGuidance"
TEXT_TO_IMAGE_HINT = (
    "Give a run of task=text2img; `python sample.py` without task= does what this one can"
)


@dataclass
class LoadedPipeline:
    """A pipeline out of a checkpoint, and what the checkpoint says of itself."""

    pipeline: Pipeline
    size: int
    path: Path
    step: int
    text_path: str | None  # where its text encoder was read from
    data: DictConfig  # what it was trained on
    precision: str  # of its networks while they sample
    settings: dict  # how it samples: sampler, guidance and which weights, as plain values
    task: dict  # what it is asked to do, likewise


def load_pipeline(cfg: DictConfig, ckpt: str, locations: dict[str, str | None]) -> LoadedPipeline:
    """The pipeline of a diffusion run: networks from the checkpoint, sampling from `cfg`.

    `asked` says, under their names, where frozen parts are now if not where the training
    configuration says; what else it holds is not looked at. Without a task in `cfg` it does what it
    was trained for.
    Raises what `parts.opened` raises, CheckpointError where a frozen part is not the one trained
    with, and UsageError for a task that the network was not trained for, for frames of pictures,
    and for a device that is not here.
    """
    device = select_device(cfg.device)
    opened = load_diffusion_checkpoint(ckpt)
    trained = opened.config
    for name in (*FROZEN_GROUPS, STYLE_GROUP):
        if locations.get(name) is not None:
            set_component_location(trained, name, locations[name])
    (autoencoder, text), style = (build_frozen_encoders(trained), build_style_encoder(trained))
    frozen = {**dict(zip(FROZEN_GROUPS, (autoencoder, text), strict=True)), STYLE_GROUP: style}
    for name, part in frozen.items():
        if part is not None and hash_module(part) != opened.digests[name]:
            raise CheckpointError(
                f"{trained[name].get('path', trained[name]._target_)} is not the {name} that "
                f"{opened.path} was trained with (its weights, or names, differ): give the right "
                f"one with {name}=..."
            )
    task, trained_task = instantiate(cfg.get("task") or trained.task), instantiate(trained.task)
    if (why := task.incompatible_with(trained_task)) is not None:
        hint = TEXT_TO_IMAGE_HINT
        if task.extra_channels(1):
            hint = TRAIN_TASK_HINT.format(task=task.name, ckpt=ckpt)
        raise UsageError(
            f"task={task.name} does not go with {opened.path}, of task={trained_task.name}: {why}. "
            f"{hint}"
        )
    frames = trained.data.get("frames")
    if frames is None and cfg.get("frames") is not None:
        raise UsageError(
            f"frames={cfg.frames} is for videos, and {opened.path} paints pictures: leave it out, "
            "or take a run of task=video"
        )
    weights = "denoiser." if cfg.raw else "ema.module."
    network = opened.network(weights, autoencoder, text, task, style)
    # What was trained on a GPU with less precision is as good as it was there; a CPU gains nothing.
    dtype = get_autocast_dtype(trained.trainer.get("precision")) if device.type == "cuda" else None
    autoencoder = autoencoder if frames is None else FramewiseAutoencoder(autoencoder)
    beside = Components(
        autoencoder.to(device), text.to(device), build_objective(trained).to(device), task, device
    )
    pipeline = Pipeline(
        network.to(device),
        autoencoder=beside.autoencoder,
        text_encoder=beside.text,
        objective=beside.objective,
        task=task,
        sampler=instantiate(cfg.sampler),
        guidance=build_guidance(cfg.guidance, beside),
        dtype=dtype,
        trained_size=trained.data.size,
        num_frames=frames and (cfg.get("frames") or frames),
        style_encoder=None if style is None else style.to(device),
    )
    return LoadedPipeline(
        pipeline,
        trained.data.size,
        opened.path.resolve(),
        opened.payload["global_step"],
        trained.text_encoder.get("path"),
        trained.data,
        "float32" if dtype is None else str(dtype).removeprefix("torch."),
        get_sampling_settings(cfg),
        OmegaConf.to_container(cfg.get("task") or trained.task),
    )


def load_cascade(
    cfg: DictConfig, ckpts: Sequence[str], locations: dict[str, str | None]
) -> list[LoadedPipeline]:
    """Pipelines of which each enlarges what the one before has painted.

    The first is guided as `cfg` says and does what it was trained for; the others are of `cfg`'s
    task, or of their own, with guidance scale `cfg.cascade_guidance_scale`: by the parts of the
    prompt where the first is, by all of its words otherwise. A single one is as `cfg` says.
    Raises what `restore` raises, and UsageError where the first paints videos or a later one
    enlarges nothing.
    """
    if len(ckpts) == 1:
        return [load_pipeline(cfg, ckpts[0], locations)]
    first = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "task"])
    later = OmegaConf.merge(cfg)
    target = COMPOSITIONAL_TARGET if is_compositional(cfg.guidance) else CLASSIFIER_FREE_TARGET
    later.guidance = {"_target_": target, "scale": cfg.cascade_guidance_scale}
    stages: list[LoadedPipeline] = []
    for ckpt in ckpts:
        stages.append(load_pipeline(later if stages else first, ckpt, locations))
        task = stages[-1].pipeline.task
        if task.is_video:
            raise UsageError(
                f"cascade: {ckpt} paints videos, and runs of task=superres enlarge pictures alone"
            )
        if len(stages) > 1 and task.scale == 1:
            raise UsageError(
                f"cascade: {ckpt} is of task={task.name} and enlarges nothing; "
                "all but the first are runs of task=superres"
            )
    return stages


def is_compositional(guidance: DictConfig) -> bool:
    """Whether this guidance, or one inside it, reads AND, NOT and weights in prompts."""
    if guidance.get("_target_") == COMPOSITIONAL_TARGET:
        return True
    return "inner" in guidance and is_compositional(guidance.inner)


def check_text_to_image(restored: LoadedPipeline, verb: str) -> None:
    """UsageError unless a run paints pictures from prompts alone, which a verb needs."""
    task, path = restored.pipeline.task, restored.path
    if task.is_video:
        raise UsageError(
            f"{verb} is for pictures, and {path} paints videos (task={task.name}): give a run of "
            "task=text2img. python sample.py paints videos, and training measures val/motion_*"
        )
    if task.needs_image or task.sampling_only:
        raise UsageError(
            f"{verb} paints from prompts alone, and task={task.name} begins with a picture: "
            "take task=text2img and a run of it. python sample.py takes image=FILE"
        )


def replace_sampling(pipeline: Pipeline, cfg: DictConfig) -> Pipeline:
    """The same networks with the sampler and guidance of `cfg`."""
    beside = Components(
        pipeline.autoencoder,
        pipeline.text_encoder,
        pipeline.objective,
        pipeline.task,
        pipeline.device,
    )
    chosen = {"sampler": instantiate(cfg.sampler), "guidance": build_guidance(cfg.guidance, beside)}
    return replace(pipeline, **chosen)


def get_sampling_settings(cfg: DictConfig) -> dict:
    """How it is sampled, as plain values."""
    return {
        "sampler": OmegaConf.to_container(cfg.sampler),
        "guidance": OmegaConf.to_container(cfg.guidance),
        "weights": "raw" if cfg.raw else "ema",
    }
