"""Configuration to the parts of a model, and a checkpoint back to a pipeline.

What a part must know of another (widths, channels) is read off the built object and handed over
here; no YAML repeats it.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ldm import checkpoint
from ldm.cli import CONF, UsageError
from ldm.diffusion.objective import Objective
from ldm.diffusion.schedule import Schedule
from ldm.metrics.features import Features
from ldm.pipeline import Pipeline

FROZEN = ("autoencoder", "text_encoder")
TRAINING = ("weighting", "loss", "time_sampler")  # of the objective; not in older checkpoints


def frozen(cfg: DictConfig) -> tuple[nn.Module, nn.Module]:
    """The autoencoder and text encoder that a denoiser is trained on."""
    for name in FROZEN:
        if cfg[name].get("path", "none needed") is None:
            stage = {"autoencoder": "autoencoder", "text_encoder": "clip"}[name]
            raise UsageError(
                f"{name}.path is needed: a trained {name.replace('_', ' ')} for the denoiser to "
                f"rest on. Train one with `python train.py experiment={stage}_coco`, then give "
                f"{name}.path=runs/{stage}_coco, or the folder or hub name of a published one"
            )
    return instantiate(cfg.autoencoder).eval(), instantiate(cfg.text_encoder)


def denoiser(cfg: DictConfig, autoencoder: nn.Module, text: nn.Module, task) -> nn.Module:
    """The network of `cfg.model`, with the sizes of the parts around it."""
    return instantiate(
        cfg.model,
        in_channels=autoencoder.channels + task.extra_channels,
        out_channels=autoencoder.channels,
        context_dim=text.width,
        pooled_dim=text.pooled_width,
        _convert_="all",
    )


def objective(cfg: DictConfig) -> Objective:
    """Schedule, prediction, weighting, loss and time sampler."""
    groups = {"schedule": "scheduler", "weighting": "weighting", "penalty": "loss"}
    # Checkpoints of before these were groups have them in `objective`, or not at all.
    built = {name: instantiate(cfg[group]) for name, group in groups.items() if group in cfg}
    if "time_sampler" in cfg:
        built["time_sampler"] = instantiate(cfg.time_sampler, batch=cfg.data.batch_size)
    return instantiate(cfg.objective, **built)


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


def schedules() -> dict[str, Schedule]:
    """Every noise schedule of conf/scheduler, by name."""
    files = sorted(Path(CONF, "scheduler").glob("*.yaml"))
    return {path.stem: instantiate(OmegaConf.load(path)) for path in files}


def restore(cfg: DictConfig, ckpt: str, asked: dict[str, str | None]) -> Restored:
    """The pipeline of a diffusion run: networks from the checkpoint, sampling from `cfg`.

    `asked` says, under their names, where frozen parts are now if not where the training
    configuration says; what else it holds is not looked at.
    Raises CheckpointError where files are damaged, or a frozen part is not the one trained with.
    """
    path = checkpoint.find(ckpt)
    payload = checkpoint.read(path)
    facts = payload.get("ldm", {})
    if facts.get("stage") != "diffusion":
        raise UsageError(
            f"{path} comes from stage={facts.get('stage', '?')}: pictures are sampled from a "
            "diffusion run, which `python train.py` makes"
        )
    trained = OmegaConf.create(facts["config"])
    for name in FROZEN:
        if asked[name] is not None:
            trained[name].path = asked[name]
    for group in (*FROZEN, "model", "scheduler", "objective", "task", *TRAINING):
        check_targets(trained.get(group, OmegaConf.create()), path)
    autoencoder, text = frozen(trained)
    for name, part in zip(FROZEN, (autoencoder, text), strict=True):
        if checkpoint.digest(part) != facts["frozen"][name]:
            raise checkpoint.CheckpointError(
                f"{trained[name].get('path')} is not the {name} that {path} was trained with "
                f"(its weights differ): give the right one with {name}=..."
            )
    task = instantiate(cfg.task)
    network = denoiser(trained, autoencoder, text, task)
    weights = "denoiser." if cfg.raw else "ema.module."
    checkpoint.load_into(network, checkpoint.part(payload, weights), what=str(path))
    device = torch.device(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # What was trained on a GPU with less precision is as good as it was there; a CPU gains nothing.
    dtype = autocast(trained.trainer.get("precision")) if device.type == "cuda" else None
    pipeline = Pipeline(
        network.eval().to(device),
        autoencoder=autoencoder.to(device),
        text=text.to(device),
        objective=objective(trained).to(device),
        task=task,
        sampler=instantiate(cfg.sampler),
        guidance=instantiate(cfg.guidance),
        dtype=dtype,
    )
    return Restored(
        pipeline,
        trained.data.size,
        path.resolve(),
        payload["global_step"],
        trained.text_encoder.get("path"),
        trained.data,
        "float32" if dtype is None else str(dtype).removeprefix("torch."),
        sampling_facts(cfg),
    )


def sampling(pipeline: Pipeline, cfg: DictConfig) -> Pipeline:
    """The same networks with the sampler and guidance of `cfg`."""
    chosen = {"sampler": instantiate(cfg.sampler), "guidance": instantiate(cfg.guidance)}
    return Pipeline(**{**vars(pipeline), **chosen})


def sampling_facts(cfg: DictConfig) -> dict:
    """How it is sampled, as plain values."""
    return {
        "sampler": OmegaConf.to_container(cfg.sampler),
        "guidance": OmegaConf.to_container(cfg.guidance),
        "weights": "raw" if cfg.raw else "ema",
    }


def features(cfg: DictConfig) -> list[Features]:
    """The networks that pictures are measured by."""
    return [instantiate(network) for network in cfg.features.values()]


def autocast(precision: str | int | None) -> torch.dtype | None:
    """What a trainer of this precision lets its networks compute in; None for float32."""
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(precision))


ROOMS = ("ldm.diffusion.", "ldm.models.", "ldm.tasks")  # where parts of a model are


def check_targets(cfg: DictConfig, path: Path, rooms: tuple[str, ...] = ROOMS) -> None:
    """Refuse a configuration from a file that names anything but what is in these rooms.

    Raises CheckpointError: a `_target_` is a call, and the file may come from anyone.
    """
    target = cfg.get("_target_")
    if target is not None and not (
        str(target).startswith(rooms) and get_object(target).__module__.startswith(rooms)
    ):
        raise checkpoint.CheckpointError(
            f"{path} asks to call {target}, which is nothing of ours: it was not run"
        )
    for node in cfg.values():
        if isinstance(node, DictConfig):
            check_targets(node, path, rooms)
