"""Configuration to a classifier on noisy latents, and a run of stage=classifier back to one."""

from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from ldm import checkpoint
from ldm.build import parts, registry
from ldm.cli import UsageError
from ldm.diffusion.schedule import Schedule
from ldm.facts import check_digests, read_facts
from ldm.models.classifier import NoisyClassifier


def network(
    cfg: DictConfig, autoencoder: nn.Module, text: nn.Module, schedule: Schedule
) -> NoisyClassifier:
    """The network of `cfg.classifier`, with the sizes of the parts around it.

    Raises ValueError where the text encoder has no pooled state.
    """
    handed = {"schedule": schedule, "in_channels": autoencoder.channels}
    return NoisyClassifier(instantiate(cfg.classifier, **handed, _convert_="all"), text)


def restore(ckpt: str, *, beside: parts.Beside) -> NoisyClassifier:
    """The classifier of a run of stage=classifier, frozen, for a model on the same latents.

    Raises UsageError for a run of another stage, autoencoder or scheduler, CheckpointError where
    files are damaged, ask for what is not ours, or the text encoder is not the one trained with.
    """
    path = checkpoint.find(ckpt, name="guidance.classifier")
    payload = checkpoint.read(path)
    facts = read_facts(payload, path)
    if facts["stage"] != "classifier":
        raise UsageError(
            f"{path} comes from stage={facts['stage']}: a classifier is what "
            "`python train.py experiment=classifier_scenes` trains"
        )
    config = registry.admit(facts["config"], path, needed=registry.CLASSIFIER)
    check_digests(facts, path, parts.FROZEN)
    if checkpoint.digest(beside.autoencoder) != facts["frozen"]["autoencoder"]:
        raise UsageError(
            f"{path} was trained on the latents of another autoencoder than the model's: train a "
            "classifier with the model's autoencoder=..."
        )
    schedule = instantiate(config.scheduler)
    if not parts.same(schedule, beside.objective.schedule):
        raise UsageError(
            f"{path} was trained on another noise schedule than the model: train a classifier with "
            "the model's scheduler=..."
        )
    text = beside.text
    if checkpoint.digest(text) != facts["frozen"]["text_encoder"]:
        text = instantiate(config.text_encoder)
        if checkpoint.digest(text) != facts["frozen"]["text_encoder"]:
            raise checkpoint.CheckpointError(
                f"{config.text_encoder.get('path', config.text_encoder._target_)} is not the "
                f"text_encoder that {path} was trained with (its weights, or names, differ)"
            )
    built = network(config, beside.autoencoder, text.to(beside.device), schedule)
    checkpoint.load_into(built, checkpoint.part(payload, "classifier."), what=str(path))
    return built.eval().requires_grad_(False).to(beside.device)
