"""Configuration to a classifier on noisy latents, and a run of stage=classifier back to one."""

from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from ldm.config import components, registry
from ldm.diffusion.schedules import Schedule
from ldm.models.noisy_classifier import NoisyClassifier
from ldm.utils import checkpoint_file
from ldm.utils.checkpoint_facts import check_digests, read_facts
from ldm.utils.errors import UsageError
from ldm.utils.hashing import hash_module


def network(
    cfg: DictConfig, autoencoder: nn.Module, text: nn.Module, schedule: Schedule
) -> NoisyClassifier:
    """The network of `cfg.classifier`, with the sizes of the parts around it.

    Raises ValueError where the text encoder has no pooled state.
    """
    handed = {"schedule": schedule, "in_channels": autoencoder.channels}
    return NoisyClassifier(instantiate(cfg.classifier, **handed, _convert_="all"), text)


def restore(ckpt: str, *, beside: components.Beside) -> NoisyClassifier:
    """The classifier of a run of stage=classifier, frozen, for a model on the same latents.

    Raises UsageError for a run of another stage, autoencoder or scheduler, CheckpointError where
    files are damaged, ask for what is not ours, or the text encoder is not the one trained with.
    """
    path = checkpoint_file.find(ckpt, name="guidance.classifier")
    payload = checkpoint_file.read(path)
    facts = read_facts(payload, path)
    if facts["stage"] != "classifier":
        raise UsageError(
            f"{path} comes from stage={facts['stage']}: a classifier is what "
            "`python train.py experiment=classifier_scenes` trains"
        )
    config = registry.admit(facts["config"], path, needed=registry.CLASSIFIER)
    check_digests(facts, path, components.FROZEN)
    if hash_module(beside.autoencoder) != facts["frozen"]["autoencoder"]:
        raise UsageError(
            f"{path} was trained on the latents of another autoencoder than the model's: train a "
            "classifier with the model's autoencoder=..."
        )
    schedule = instantiate(config.scheduler)
    if not components.same(schedule, beside.objective.schedule):
        raise UsageError(
            f"{path} was trained on another noise schedule than the model: train a classifier with "
            "the model's scheduler=..."
        )
    text = beside.text
    if hash_module(text) != facts["frozen"]["text_encoder"]:
        text = instantiate(config.text_encoder)
        if hash_module(text) != facts["frozen"]["text_encoder"]:
            raise checkpoint_file.CheckpointError(
                f"{config.text_encoder.get('path', config.text_encoder._target_)} is not the "
                f"text_encoder that {path} was trained with (its weights, or names, differ)"
            )
    built = network(config, beside.autoencoder, text.to(beside.device), schedule)
    checkpoint_file.load_into(built, checkpoint_file.part(payload, "classifier."), what=str(path))
    return built.eval().requires_grad_(False).to(beside.device)
