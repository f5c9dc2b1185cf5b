"""Configuration to guidance, with the models that some kinds of guidance need."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ldm.config.components import (
    FROZEN_GROUPS,
    build_denoiser,
    build_objective,
    build_style_encoder,
    load_stage_checkpoint,
)
from ldm.config.own_components import CLASSIFIER_GROUPS
from ldm.config.published import open_checkpoint
from ldm.diffusion.guidance.base import Guidance
from ldm.diffusion.guidance.cfg import GuideDenoiser
from ldm.diffusion.schedules import Schedule, is_same_schedule
from ldm.inference.components import Components
from ldm.models.noisy_classifier import NoisyClassifier
from ldm.utils.checkpoint_file import CheckpointError, load_module_state, select_prefix
from ldm.utils.errors import UsageError, format_program
from ldm.utils.hashing import hash_module

if TYPE_CHECKING:
    from ldm.models.clip_reward import ClipReward

GUIDANCE_MODEL_HINTS = {
    "guide": "a checkpoint of a worse run of the same kind",
    "classifier": "a run of stage=classifier, as experiment=classifier_scenes trains",
    "reward_model": "a CLIP: packaged:clip, a folder, or a name on the hub",
}


def build_guidance(
    cfg: DictConfig,
    components: Components,
    *,
    device: torch.device,
    trust: Sequence[str] | None = None,
) -> Guidance:
    """The guidance of `cfg` with its inner guidance and its models, which are put on `device`."""
    loaders = {
        "guide": partial(load_guide_denoiser, trust=trust),
        "classifier": partial(load_classifier_guide, trust=trust),
        "reward_model": load_clip_reward,
    }
    for name, hint in GUIDANCE_MODEL_HINTS.items():
        if name in cfg and cfg[name] is None:
            raise UsageError(f"guidance.{name} is needed: {hint}")
    built = {
        name: load(cfg[name], components, device=device)
        for name, load in loaders.items()
        if name in cfg
    }
    if "classifier" in built or "reward_model" in built:
        built["schedule"] = components.objective.schedule
    if "inner" in cfg:
        built["inner"] = build_guidance(cfg.inner, components, device=device, trust=trust)
    if cfg.get("rescale"):
        built["x0_at_zero_output"] = components.objective.x0_at_zero_output
    leaf = OmegaConf.masked_copy(cfg, [key for key in cfg if key not in built])
    # Passed to the call: instantiate would take apart what is a dataclass.
    return instantiate(leaf, _partial_=True, _convert_="all")(**built)


def load_guide_denoiser(
    path: str, components: Components, *, device: torch.device, trust: Sequence[str] | None = None
) -> GuideDenoiser:
    """The averaged denoiser of a run on the same latents, text encoder and schedule."""
    source, task = (open_checkpoint(path, name="guidance.guide", trust=trust), components.task)
    trained_task = instantiate(source.config.task)
    if (why := task.incompatible_with(trained_task)) is not None:
        raise UsageError(
            f"guidance.guide={path} is of task={trained_task.name} and cannot guide "
            f"task={task.name}: {why}"
        )
    for name in FROZEN_GROUPS:
        if components.hash_frozen(name) != source.hash_frozen(name):
            raise UsageError(
                f"guidance.guide={path} was trained with another {name}: a guide answers for the "
                "same latents and the same states of the text"
            )
    objective = build_objective(source.config).to(device)
    if not is_same_schedule(objective.schedule, components.objective.schedule):
        raise UsageError(f"guidance.guide={path} was trained on another scheduler")
    style_encoder = build_style_encoder(source.config)
    encoders = (components.autoencoder, components.text_encoder, style_encoder)
    denoiser = build_denoiser(source.config, *encoders, task)
    source.load_denoiser(denoiser, "ema.module.").to(device)

    def denoise(x_t, t, cond, network_timestep):
        t = t.to(x_t.device)
        timestep = network_timestep(objective.schedule, t)
        return objective.predict_x0(denoiser, x_t, t, cond, timestep=timestep)

    return denoise


def load_classifier_guide(
    path: str, components: Components, *, device: torch.device, trust: Sequence[str] | None = None
):
    """The log likelihoods of a run of stage=classifier; UsageError for tasks of videos."""
    if components.task.is_video:
        raise UsageError(
            f"guidance=classifier reads images, and task={components.task.name} is of videos: "
            "guidance=clip and guidance=autoguidance guide these"
        )
    return load_noisy_classifier(path, components, device=device, trust=trust).make_log_likelihood


def load_clip_reward(path: str, components: Components, *, device: torch.device) -> "ClipReward":
    """A CLIP that reads decoded latents; UsageError where there is none at `path`."""
    from ldm.models.clip import Clip  # transformers: seconds, for this guidance alone
    from ldm.models.clip_reward import ClipReward

    try:
        clip = Clip.load(path)
    except OSError as error:
        why = str(error).splitlines()[0] if Path(path).is_dir() else "there is no such CLIP"
        hint = GUIDANCE_MODEL_HINTS["reward_model"]
        raise UsageError(f"guidance.reward_model={path}: {why}. Give {hint}") from error
    return ClipReward(clip.to(device), components.autoencoder.decode)


def build_noisy_classifier(
    cfg: DictConfig, autoencoder: nn.Module, text_encoder: nn.Module, schedule: Schedule
) -> NoisyClassifier:
    """The network of `cfg.classifier`, with the sizes of the components around it."""
    sizes = {"schedule": schedule, "in_channels": autoencoder.channels}
    return NoisyClassifier(instantiate(cfg.classifier, **sizes, _convert_="all"), text_encoder)


def load_noisy_classifier(
    ckpt: str, components: Components, *, device: torch.device, trust: Sequence[str] | None = None
) -> NoisyClassifier:
    """The classifier of a run of stage=classifier, frozen, for a model on the same latents."""
    hint = f"a classifier is what `{format_program('train')} experiment=classifier_scenes` trains"
    loaded = load_stage_checkpoint(
        ckpt,
        name="guidance.classifier",
        stage="classifier",
        needed=CLASSIFIER_GROUPS,
        trust=trust,
        hint=hint,
    )
    path, config = loaded.path, loaded.config
    if components.hash_frozen("autoencoder") != loaded.digests["autoencoder"]:
        raise UsageError(
            f"{path} was trained on the latents of another autoencoder than the model's: train a "
            "classifier with the model's autoencoder=..."
        )
    schedule = instantiate(config.scheduler)
    if not is_same_schedule(schedule, components.objective.schedule):
        raise UsageError(
            f"{path} was trained on another noise schedule than the model: train a classifier with "
            "the model's scheduler=..."
        )
    text_encoder = load_text_encoder(config, components, loaded.digests["text_encoder"], path)
    built = build_noisy_classifier(
        config, components.autoencoder, text_encoder.to(device), schedule
    )
    load_module_state(built, select_prefix(loaded.payload, "classifier."), what=str(path))
    return built.eval().requires_grad_(False).to(device)


def load_text_encoder(
    config: DictConfig, components: Components, digest: str, path: Path
) -> nn.Module:
    """The text encoder with this digest: the model's own, or that of `config`."""
    # One that is not built cannot say which names it tells apart.
    if not components.known_digests and hash_module(components.text_encoder) == digest:
        return components.text_encoder
    text_encoder = instantiate(config.text_encoder)
    if hash_module(text_encoder) != digest:
        raise CheckpointError(
            f"{config.text_encoder.get('path', config.text_encoder._target_)} is not the "
            f"text_encoder that {path} was trained with (its weights, or names, differ)"
        )
    return text_encoder
