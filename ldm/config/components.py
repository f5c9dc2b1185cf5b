"""Configuration, or a checkpoint's, to the parts of a model.

What a part must know of another (widths, channels) is read off the built object and handed over
here; no YAML repeats it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ldm.config.registry import DIFFUSION_GROUPS, validate_file_config
from ldm.config.suggestions import CONF_DIR
from ldm.diffusion.objective import Objective
from ldm.diffusion.schedules import Schedule
from ldm.evaluation.features.base import FeatureExtractor
from ldm.models.warm_start import warm_start
from ldm.utils.checkpoint_facts import check_frozen_digests, read_checkpoint_metadata
from ldm.utils.checkpoint_file import (
    find_checkpoint,
    load_module_state,
    read_checkpoint,
    select_prefix,
)
from ldm.utils.errors import UsageError
from ldm.utils.hashing import hash_module

FROZEN_GROUPS = ("autoencoder", "text_encoder")
STYLE_GROUP = "style_encoder"  # frozen as well, where there is one


def build_frozen_encoders(cfg: DictConfig) -> tuple[nn.Module, nn.Module]:
    """The autoencoder and text encoder that a denoiser is trained on."""
    for name in FROZEN_GROUPS:
        if cfg[name].get("path", "none needed") is None:
            stage = {"autoencoder": "autoencoder", "text_encoder": "clip"}[name]
            raise UsageError(
                f"{name}.path is needed: a trained {name.replace('_', ' ')} for the denoiser to "
                f"rest on. Train one with `python train.py experiment={stage}_coco`, then give "
                f"{name}.path=runs/{stage}_coco, or the folder or hub name of a published one"
            )
    return instantiate(cfg.autoencoder).eval(), instantiate(cfg.text_encoder)


def set_component_location(cfg: DictConfig, name: str, location: str) -> None:
    """Have a frozen part read from `place`; UsageError where it is read from nowhere."""
    part = cfg.get(name) or {}
    key = next((key for key in ("path", "names") if key in part), None)
    if key is None:
        raise UsageError(
            f"{name}={location}: the run was trained with {part.get('_target_', 'none')}, which is "
            "read from nowhere: leave it out"
        )
    cfg[name][key] = location


def build_style_encoder(cfg: DictConfig) -> nn.Module | None:
    """What reads style pictures; None where the denoiser is told of none."""
    return instantiate(cfg[STYLE_GROUP], _convert_="all") if cfg.get(STYLE_GROUP) else None


def build_denoiser(
    cfg: DictConfig, autoencoder: nn.Module, text: nn.Module, task, style: nn.Module | None = None
) -> nn.Module:
    """The network of `cfg.model`, with the sizes of the parts around it."""
    more = {} if style is None else {"style_dim": style.width, "style_code": style.code}
    more |= {"temporal": True} if task.is_video else {}
    return instantiate(
        cfg.model,
        in_channels=autoencoder.channels + task.extra_channels(autoencoder.channels),
        out_channels=autoencoder.channels,
        context_dim=text.width,
        pooled_dim=text.pooled_width,
        **more,
        _convert_="all",
    )


def build_objective(cfg: DictConfig) -> Objective:
    """Schedule, prediction, weighting, loss and time sampler."""
    groups = {"schedule": "scheduler", "weighting": "weighting", "loss": "loss"}
    # Checkpoints of before these were groups have them in `objective`, or not at all.
    built = {name: instantiate(cfg[group]) for name, group in groups.items() if group in cfg}
    if "timestep_sampler" in cfg:
        built["timestep_sampler"] = instantiate(cfg.timestep_sampler, batch=cfg.data.batch_size)
    # Not as arguments of `instantiate`: Hydra turns a dataclass there into a configuration.
    return instantiate(cfg.objective, _partial_=True)(**built)


@dataclass(frozen=True)
class Components:
    """What is there already where guidance and its models are built."""

    autoencoder: nn.Module
    text: nn.Module
    objective: Objective
    task: object
    device: torch.device


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint of a diffusion run, read and found harmless; nothing is built yet."""

    path: Path
    payload: dict
    config: DictConfig  # the parts that it was trained with, and what they are sized by

    @property
    def digests(self) -> dict[str, str]:
        """Of the frozen parts that it was trained with."""
        return self.payload["ldm"]["frozen"]

    def network(
        self,
        weights: str,
        autoencoder: nn.Module,
        text: nn.Module,
        task,
        style: nn.Module | None = None,
    ) -> nn.Module:
        """Its denoiser in eval mode, on the CPU; weights: the prefix in the state dict."""
        built = build_denoiser(self.config, autoencoder, text, task, style)
        load_module_state(built, select_prefix(self.payload, weights), what=str(self.path))
        return built.eval()


def load_diffusion_checkpoint(ckpt: str, *, name: str = "ckpt") -> LoadedCheckpoint:
    """The newest checkpoint of a run directory, or a file; name: the setting that asks for it.

    Raises UsageError for one of another stage, CheckpointError where it is damaged or asks for what
    is not ours.
    """
    path = find_checkpoint(ckpt, name=name)
    payload = read_checkpoint(path)
    facts = read_checkpoint_metadata(payload, path)
    if facts["stage"] != "diffusion":
        raise UsageError(
            f"{path} comes from stage={facts['stage']}: pictures are sampled from a "
            "diffusion run, which `python train.py` makes"
        )
    config = validate_file_config(facts["config"], path, needed=DIFFUSION_GROUPS)
    frozen = (*FROZEN_GROUPS, STYLE_GROUP) if STYLE_GROUP in config else FROZEN_GROUPS
    check_frozen_digests(facts, path, frozen)
    return LoadedCheckpoint(path, payload, config)


def warm_start_from_run(
    init: str, network: nn.Module, frozen: dict[str, nn.Module], schedule: Schedule
) -> str:
    """Start a network from the averaged one of another run; what was done, in a line.

    Raises what `opened` and `begin` raise, and UsageError where its frozen parts or its schedule
    are others: what it has learnt is of those. It may know of no style where there is one now.
    """
    source = load_diffusion_checkpoint(init, name="init")
    others = [
        name
        for name, digest in source.digests.items()
        if name not in frozen or hash_module(frozen[name]) != digest
    ]
    if not is_same_schedule(build_objective(source.config).schedule, schedule):
        others.append("scheduler")
    if others:
        given = " ".join(word for name in others for word in suggest_overrides(source.config, name))
        raise UsageError(
            f"init={init} was trained with another {' and '.join(others)}: add {given}"
        )
    new = warm_start(network, select_prefix(source.payload, "ema.module."), source=init)
    told = f"; new, and without effect as yet: {', '.join(new)}" if new else ""
    return f"init: the weights of {source.path}{told}"


def suggest_overrides(cfg: DictConfig, group: str) -> list[str]:
    """How to ask for what a configuration has in a group: the nearest option, and what differs."""
    have, found = OmegaConf.to_container(cfg[group]), []
    for path in sorted(Path(CONF_DIR, group).glob("*.yaml")):
        option = OmegaConf.load(path)
        other = {key: value for key, value in have.items() if option.get(key, ...) != value}
        words = {k: v if isinstance(v, str) else json.dumps(v) for k, v in other.items()}
        found.append([f"{group}={path.stem}", *(f"{group}.{k}={v}" for k, v in words.items())])
    return min(found, key=len)


def is_same_schedule(a: Schedule, b: Schedule) -> bool:
    """Whether two schedules have the same noise at the same times."""
    t = torch.linspace(0, 1, 65, dtype=torch.float64)
    return all(torch.equal(one.cpu(), two.cpu()) for one, two in zip(a(t), b(t), strict=True))


def build_all_schedules() -> dict[str, Schedule]:
    """Every noise schedule of conf/scheduler, by name."""
    files = sorted(Path(CONF_DIR, "scheduler").glob("*.yaml"))
    return {path.stem: instantiate(OmegaConf.load(path)) for path in files}


def build_feature_extractors(cfg: DictConfig) -> list[FeatureExtractor]:
    """The networks that pictures are measured by."""
    return [instantiate(network) for network in cfg.features.values()]


def get_autocast_dtype(precision: str | int | None) -> torch.dtype | None:
    """What a trainer of this precision lets its networks compute in; None for float32."""
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(precision))
