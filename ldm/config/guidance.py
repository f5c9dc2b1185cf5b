"""Configuration to guidance, with the models that some kinds of it ask."""

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ldm.config.classifier import load_noisy_classifier
from ldm.config.components import (
    FROZEN_GROUPS,
    Components,
    build_objective,
    build_style_encoder,
    is_same_schedule,
    load_diffusion_checkpoint,
)
from ldm.diffusion.guidance.base import ConditionalDenoiser, Guidance
from ldm.models.clip import Clip
from ldm.models.clip_reward import ClipReward
from ldm.utils.errors import UsageError
from ldm.utils.hashing import hash_module


def build_guidance(cfg: DictConfig, components: Components) -> Guidance:
    """The guidance of `cfg`, its inner ones and their models included.

    Raises UsageError where a model is not named, or is of another space than the denoiser.
    """
    makers = {
        "inner": build_guidance,
        "guide": load_guide_denoiser,
        "classifier": load_classifier_guide,
        "reward_model": load_clip_reward,
    }
    needed = {name: make for name, make in makers.items() if name in cfg}
    for name in needed:
        if cfg[name] is None:
            raise UsageError(f"guidance.{name} is needed: {GUIDANCE_MODEL_HINTS[name]}")
    built = {name: make(cfg[name], components) for name, make in needed.items()}
    if "classifier" in built or "reward_model" in built:
        built["schedule"] = components.objective.schedule
    if cfg.get("rescale"):
        built["x0_at_zero_output"] = components.objective.x0_at_zero_output
    leaf = OmegaConf.masked_copy(cfg, [key for key in cfg if key not in built])
    # Handed to the call and not to instantiate, which would take apart what is a dataclass.
    return instantiate(leaf, _partial_=True, _convert_="all")(**built)


GUIDANCE_MODEL_HINTS = {
    "guide": "a checkpoint of a worse run of the same kind",
    "classifier": "a run of stage=classifier, as experiment=classifier_scenes trains",
    "reward_model": "a CLIP: packaged:clip, a folder, or a name on the hub",
}


def load_guide_denoiser(path: str, components: Components) -> ConditionalDenoiser:
    """The averaged denoiser of a checkpoint, on the same latents, text and schedule as ours.

    Raises UsageError where it is of others, or of another task.
    """
    opened = load_diffusion_checkpoint(path, name="guidance.guide")
    trained = instantiate(opened.config.task)
    if (why := components.task.incompatible_with(trained)) is not None:
        raise UsageError(
            f"guidance.guide={path} is of task={trained.name} and cannot guide "
            f"task={components.task.name}: {why}"
        )
    for name, part in zip(FROZEN_GROUPS, (components.autoencoder, components.text), strict=True):
        if hash_module(part) != opened.digests[name]:
            raise UsageError(
                f"guidance.guide={path} was trained with another {name}: a guide answers for the "
                "same latents and the same states of the text"
            )
    objective = build_objective(opened.config)
    if not is_same_schedule(objective.schedule, components.objective.schedule):
        raise UsageError(f"guidance.guide={path} was trained on another scheduler")
    style = build_style_encoder(opened.config)
    network = opened.network(
        "ema.module.", components.autoencoder, components.text, components.task, style
    )
    network, objective = network.to(components.device), objective.to(components.device)

    def denoise(x_t, t, cond):
        return objective.predict_x0(network, x_t, t.to(x_t.device), cond)

    return denoise


def load_classifier_guide(path: str, components: Components):
    """The classifier of a run of stage=classifier, for ldm.diffusion.guidance.gradient.

    Raises UsageError where videos are painted.
    """
    if components.task.is_video:
        raise UsageError(
            f"guidance=classifier reads pictures, and task={components.task.name} is of videos: "
            "guidance=clip and guidance=autoguidance guide these"
        )
    return load_noisy_classifier(path, components=components).make_log_likelihood


def load_clip_reward(path: str, components: Components) -> ClipReward:
    """A CLIP that looks at decoded latents."""
    return ClipReward(Clip.load(path).to(components.device), components.autoencoder.decode)
