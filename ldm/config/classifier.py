"""Configuration to a classifier on noisy latents, and a run of stage=classifier back to one."""

from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from ldm.config.components import FROZEN_GROUPS, Components, is_same_schedule
from ldm.config.registry import CLASSIFIER_GROUPS, validate_file_config
from ldm.diffusion.schedules import Schedule
from ldm.models.noisy_classifier import NoisyClassifier
from ldm.utils.checkpoint_facts import check_frozen_digests, read_checkpoint_metadata
from ldm.utils.checkpoint_file import (
    CheckpointError,
    find_checkpoint,
    load_module_state,
    read_checkpoint,
    select_prefix,
)
from ldm.utils.errors import UsageError
from ldm.utils.hashing import hash_module


def build_noisy_classifier(
    cfg: DictConfig, autoencoder: nn.Module, text: nn.Module, schedule: Schedule
) -> NoisyClassifier:
    """The network of `cfg.classifier`, with the sizes of the parts around it.

    Raises ValueError where the text encoder has no pooled state.
    """
    handed = {"schedule": schedule, "in_channels": autoencoder.channels}
    return NoisyClassifier(instantiate(cfg.classifier, **handed, _convert_="all"), text)


def load_noisy_classifier(ckpt: str, *, components: Components) -> NoisyClassifier:
    """The classifier of a run of stage=classifier, frozen, for a model on the same latents.

    Raises UsageError for a run of another stage, autoencoder or scheduler, CheckpointError where
    files are damaged, ask for what is not ours, or the text encoder is not the one trained with.
    """
    path = find_checkpoint(ckpt, name="guidance.classifier")
    payload = read_checkpoint(path)
    facts = read_checkpoint_metadata(payload, path)
    if facts["stage"] != "classifier":
        raise UsageError(
            f"{path} comes from stage={facts['stage']}: a classifier is what "
            "`python train.py experiment=classifier_scenes` trains"
        )
    config = validate_file_config(facts["config"], path, needed=CLASSIFIER_GROUPS)
    check_frozen_digests(facts, path, FROZEN_GROUPS)
    if hash_module(components.autoencoder) != facts["frozen"]["autoencoder"]:
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
    text = components.text
    if hash_module(text) != facts["frozen"]["text_encoder"]:
        text = instantiate(config.text_encoder)
        if hash_module(text) != facts["frozen"]["text_encoder"]:
            raise CheckpointError(
                f"{config.text_encoder.get('path', config.text_encoder._target_)} is not the "
                f"text_encoder that {path} was trained with (its weights, or names, differ)"
            )
    built = build_noisy_classifier(
        config, components.autoencoder, text.to(components.device), schedule
    )
    load_module_state(built, select_prefix(payload, "classifier."), what=str(path))
    return built.eval().requires_grad_(False).to(components.device)
