"""A checkpoint to a pipeline: networks from the file, sampling from the configuration."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ldm.config import components
from ldm.config.components import Beside
from ldm.config.devices import device_of
from ldm.config.guidance import guidance
from ldm.inference.pipeline import Pipeline
from ldm.models.frames import Frames
from ldm.utils import checkpoint_file
from ldm.utils.errors import UsageError
from ldm.utils.hashing import hash_module

REMEDY = "Train one: python train.py task={task} init={ckpt} name=my-{task}"
CLASSIFIER_FREE = "ldm.diffusion.guidance.base.ClassifierFree"
COMPOSED = "ldm.diffusion.guidance.compositional.Composed"
WITHOUT = "Give a run of task=text2img; `python sample.py` without task= does what this one can"


@dataclass
class Restored:
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


def restore(cfg: DictConfig, ckpt: str, asked: dict[str, str | None]) -> Restored:
    """The pipeline of a diffusion run: networks from the checkpoint, sampling from `cfg`.

    `asked` says, under their names, where frozen parts are now if not where the training
    configuration says; what else it holds is not looked at. Without a task in `cfg` it does what it
    was trained for.
    Raises what `parts.opened` raises, CheckpointError where a frozen part is not the one trained
    with, and UsageError for a task that the network was not trained for, for frames of pictures,
    and for a device that is not here.
    """
    device = device_of(cfg.device)
    opened = components.opened(ckpt)
    trained = opened.config
    for name in (*components.FROZEN, components.STYLE):
        if asked.get(name) is not None:
            components.move(trained, name, asked[name])
    (autoencoder, text), style = components.frozen(trained), components.style_encoder(trained)
    frozen = {
        **dict(zip(components.FROZEN, (autoencoder, text), strict=True)),
        components.STYLE: style,
    }
    for name, part in frozen.items():
        if part is not None and hash_module(part) != opened.digests[name]:
            raise checkpoint_file.CheckpointError(
                f"{trained[name].get('path', trained[name]._target_)} is not the {name} that "
                f"{opened.path} was trained with (its weights, or names, differ): give the right "
                f"one with {name}=..."
            )
    task, trained_task = instantiate(cfg.get("task") or trained.task), instantiate(trained.task)
    if (why := task.unfit(trained_task)) is not None:
        raise UsageError(
            f"task={task.name} does not go with {opened.path}, of task={trained_task.name}: {why}. "
            f"{REMEDY.format(task=task.name, ckpt=ckpt) if task.extra_channels(1) else WITHOUT}"
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
    dtype = components.autocast(trained.trainer.get("precision")) if device.type == "cuda" else None
    autoencoder = autoencoder if frames is None else Frames(autoencoder)
    beside = Beside(
        autoencoder.to(device),
        text.to(device),
        components.objective(trained).to(device),
        task,
        device,
    )
    pipeline = Pipeline(
        network.to(device),
        autoencoder=beside.autoencoder,
        text=beside.text,
        objective=beside.objective,
        task=task,
        sampler=instantiate(cfg.sampler),
        guidance=guidance(cfg.guidance, beside),
        dtype=dtype,
        trained_size=trained.data.size,
        frames=frames and (cfg.get("frames") or frames),
        style_encoder=None if style is None else style.to(device),
    )
    return Restored(
        pipeline,
        trained.data.size,
        opened.path.resolve(),
        opened.payload["global_step"],
        trained.text_encoder.get("path"),
        trained.data,
        "float32" if dtype is None else str(dtype).removeprefix("torch."),
        sampling_facts(cfg),
        OmegaConf.to_container(cfg.get("task") or trained.task),
    )


def cascade(cfg: DictConfig, ckpts: Sequence[str], asked: dict[str, str | None]) -> list[Restored]:
    """Pipelines of which each enlarges what the one before has painted.

    The first is guided as `cfg` says and does what it was trained for; the others are of `cfg`'s
    task, or of their own, and guided by `cfg.enlarging`: by the parts of the prompt where the first
    is, by all of its words otherwise. A single one is as `cfg` says.
    Raises what `restore` raises, and UsageError where the first paints videos or a later one
    enlarges nothing.
    """
    if len(ckpts) == 1:
        return [restore(cfg, ckpts[0], asked)]
    first = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "task"])
    later = OmegaConf.merge(cfg)
    target = COMPOSED if composes(cfg.guidance) else CLASSIFIER_FREE
    later.guidance = {"_target_": target, "scale": cfg.enlarging}
    stages: list[Restored] = []
    for ckpt in ckpts:
        stages.append(restore(later if stages else first, ckpt, asked))
        task = stages[-1].pipeline.task
        if task.temporal:
            raise UsageError(
                f"cascade: {ckpt} paints videos, and runs of task=superres enlarge pictures alone"
            )
        if len(stages) > 1 and task.scale == 1:
            raise UsageError(
                f"cascade: {ckpt} is of task={task.name} and enlarges nothing; "
                "all but the first are runs of task=superres"
            )
    return stages


def composes(guidance: DictConfig) -> bool:
    """Whether this guidance, or one inside it, reads AND, NOT and weights in prompts."""
    if guidance.get("_target_") == COMPOSED:
        return True
    return "inner" in guidance and composes(guidance.inner)


def check_text_to_image(restored: Restored, verb: str) -> None:
    """UsageError unless a run paints pictures from prompts alone, which a verb needs."""
    task, path = restored.pipeline.task, restored.path
    if task.temporal:
        raise UsageError(
            f"{verb} is for pictures, and {path} paints videos (task={task.name}): give a run of "
            "task=text2img. python sample.py paints videos, and training measures val/motion_*"
        )
    if task.from_pictures or task.of_any_run:
        raise UsageError(
            f"{verb} paints from prompts alone, and task={task.name} begins with a picture: "
            "take task=text2img and a run of it. python sample.py takes image=FILE"
        )


def sampling(pipeline: Pipeline, cfg: DictConfig) -> Pipeline:
    """The same networks with the sampler and guidance of `cfg`."""
    beside = Beside(
        pipeline.autoencoder, pipeline.text, pipeline.objective, pipeline.task, pipeline.device
    )
    chosen = {"sampler": instantiate(cfg.sampler), "guidance": guidance(cfg.guidance, beside)}
    return replace(pipeline, **chosen)


def sampling_facts(cfg: DictConfig) -> dict:
    """How it is sampled, as plain values."""
    return {
        "sampler": OmegaConf.to_container(cfg.sampler),
        "guidance": OmegaConf.to_container(cfg.guidance),
        "weights": "raw" if cfg.raw else "ema",
    }
