"""Configuration, or a checkpoint, to the components of a model; sizes are read from built ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ldm.config.own_components import DIFFUSION_GROUPS
from ldm.config.registry import validate_file_config
from ldm.config.schedule_shift import resolve_schedule_shift
from ldm.config.search_path import CONF_DIR
from ldm.config.suggestions import suggest_overrides
from ldm.diffusion.objective import Objective
from ldm.diffusion.schedules import Schedule, is_same_schedule
from ldm.diffusion.tasks.base import Task
from ldm.evaluation.features.base import FeatureExtractor
from ldm.evaluation.image_metrics import ImageMetric
from ldm.inference.components import Components
from ldm.models.temporal import FramewiseAutoencoder
from ldm.utils.bundle_file import is_bundle, read_bundle
from ldm.utils.checkpoint_facts import check_frozen_digests, read_checkpoint_metadata
from ldm.utils.checkpoint_file import (
    CheckpointError,
    find_checkpoint,
    load_module_state,
    read_checkpoint,
    select_prefix,
)
from ldm.utils.errors import UsageError, format_program
from ldm.utils.files import resolve_path
from ldm.utils.hashing import hash_module
from ldm.utils.lora_weights import merge_adapters

FROZEN_GROUPS = ("autoencoder", "text_encoder")
STYLE_GROUP = "style_encoder"  # frozen as well, where there is one


def build_components(
    cfg: DictConfig, task: Task, *, encoders: tuple[nn.Module, nn.Module] | None = None
) -> Components:
    """All components of a model. Their order decides the random initial weights.

    encoders: the autoencoder and the text encoder; None: those of the settings.
    """
    autoencoder, text_encoder = encoders or build_frozen_encoders(cfg)
    style_encoder = build_style_encoder(cfg)
    denoiser = build_denoiser(cfg, autoencoder, text_encoder, style_encoder, task)
    if task.is_video:
        autoencoder = FramewiseAutoencoder(autoencoder)
    resolve_schedule_shift(cfg, autoencoder)
    objective = build_objective(cfg)
    return Components(denoiser, autoencoder, text_encoder, style_encoder, objective, task)


def build_frozen_encoders(cfg: DictConfig) -> tuple[nn.Module, nn.Module]:
    """The autoencoder and the text encoder that a denoiser is trained on."""
    return instantiate(cfg.autoencoder).eval(), instantiate(cfg.text_encoder)


def build_style_encoder(cfg: DictConfig) -> nn.Module | None:
    """The encoder of style images; None where the denoiser takes none."""
    return instantiate(cfg[STYLE_GROUP], _convert_="all") if cfg.get(STYLE_GROUP) else None


def build_denoiser(
    cfg: DictConfig,
    autoencoder: nn.Module,
    text_encoder: nn.Module,
    style_encoder: nn.Module | None,
    task: Task,
) -> nn.Module:
    """The network of `cfg.model`, with the sizes of the components around it."""
    sizes = {"temporal": True} if task.is_video else {}
    if style_encoder is not None:
        sizes |= {"style_dim": style_encoder.width, "style_code": style_encoder.code}
    if cfg.model.get("size_embedding"):
        sizes["size_factor"] = autoencoder.factor
    return instantiate(
        cfg.model,
        in_channels=autoencoder.channels + task.extra_channels(autoencoder.channels),
        out_channels=autoencoder.channels,
        context_dim=text_encoder.width,
        pooled_dim=text_encoder.pooled_width,
        **sizes,
        _convert_="all",
    )


def build_objective(cfg: DictConfig) -> Objective:
    """Schedule, prediction, weighting, loss and timestep sampler."""
    groups = {"schedule": "scheduler", "weighting": "weighting", "loss": "loss"}
    # Older checkpoints have them in `objective`, or not at all.
    built = {name: instantiate(cfg[group]) for name, group in groups.items() if group in cfg}
    if "timestep_sampler" in cfg:
        built["timestep_sampler"] = instantiate(cfg.timestep_sampler, batch=cfg.data.batch_size)
    # Passed to the call: instantiate would turn dataclasses into configurations.
    return instantiate(cfg.objective, _partial_=True)(**built)


def build_all_schedules() -> dict[str, Schedule]:
    """Every noise schedule of ours, by name."""
    files = sorted(Path(CONF_DIR, "scheduler").glob("*.yaml"))
    return {path.stem: instantiate(OmegaConf.load(path)) for path in files}


def build_feature_extractors(cfg: DictConfig) -> list[FeatureExtractor]:
    """The networks whose features images are compared by."""
    return [instantiate(network) for network in cfg.features.values()]


def build_image_metrics(cfg: DictConfig) -> dict[str, ImageMetric]:
    """The metrics of the group `metrics`, by name; UsageError for anything else in it."""
    metrics = {name: instantiate(node, _convert_="all") for name, node in cfg.metrics.items()}
    for name, metric in metrics.items():
        lacks = [part for part in ("update", "compute", "reset") if not hasattr(metric, part)]
        if lacks:
            target = cfg.metrics[name]["_target_"]
            raise UsageError(f"metrics.{name}: {target} is no metric: it has no {lacks[0]}()")
    return metrics


def choose_precision(accelerator: str) -> str:
    """The precision of a training: bfloat16 on a GPU that has it, otherwise float32."""
    on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    has_bfloat16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if has_bfloat16 else "32-true"


def get_autocast_dtype(precision: str | int | None) -> torch.dtype | None:
    """The dtype in which a trainer of this precision runs its networks; None for float32."""
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(precision))


def choose_autocast_dtype(
    name: str | None, precision: str | int | None, device: torch.device
) -> torch.dtype | None:
    """The dtype of networks while they sample; None for float32.

    name=None: on a GPU the dtype of training with this precision; on a CPU float32, because many
    CPUs have no arithmetic for a smaller dtype.
    """
    if name is None:
        return get_autocast_dtype(precision) if device.type == "cuda" else None
    return None if name == "float32" else getattr(torch, name)


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint of a run that was read and validated; nothing is built yet."""

    path: Path
    payload: dict
    config: DictConfig  # the component groups that it was trained with, and what sizes them

    @property
    def digests(self) -> dict[str, str]:
        """The digests of the frozen components that it was trained with."""
        return self.payload["ldm"]["frozen"]

    def hash_frozen(self, name: str) -> str:
        """The digest of a frozen component that it was trained with."""
        return self.digests[name]

    def select_weights(self, prefix: str) -> dict[str, Tensor]:
        """The weights with this prefix of the state dict, with the adapters of a LoRA run added."""
        state = select_prefix(self.payload, prefix)
        try:
            return merge_adapters(state, self.payload["ldm"])
        except ValueError as error:
            raise CheckpointError(f"{self.path} is damaged: {error}") from error

    @property
    def step(self) -> int:
        """The optimizer steps that it was trained for."""
        return self.payload["global_step"]

    def build(self, task: Task) -> Components:
        """Its components for a task; the denoiser has random weights."""
        return build_components(self.config, task)

    def check_frozen(self, frozen: Mapping[str, nn.Module]) -> dict[str, str]:
        """CheckpointError for a frozen component that it was not trained with; an empty dict."""
        for name, part in frozen.items():
            if hash_module(part) != self.digests[name]:
                node = self.config[name]
                raise CheckpointError(
                    f"{node.get('path', node._target_)} is not the {name} that {self.path} was "
                    f"trained with (its weights, or names, differ): give the right one with "
                    f"{name}=..."
                )
        return {}

    def list_differences(self, components: Components, cfg: DictConfig) -> list[str]:
        """The groups that are different in a training that starts from it."""
        frozen = components.frozen
        others = [
            name
            for name, digest in self.digests.items()
            if name not in frozen or components.hash_frozen(name) != digest
        ]
        schedule = build_objective(self.config).schedule
        same = is_same_schedule(schedule, components.objective.schedule)
        return others if same else [*others, "scheduler"]

    def format_remedy(self, others: Sequence[str]) -> str:
        """The words of the command line that remove the differences of `list_differences`."""
        words = [word for name in others for word in suggest_overrides(self.config, name)]
        return f"add {' '.join(words)}"

    def read_weights(self) -> dict[str, Tensor]:
        """The averaged weights of the network."""
        return self.select_weights("ema.module.")

    def load_denoiser(self, denoiser: nn.Module, weights: str) -> nn.Module:
        """Puts the weights with this prefix of the state dict into a denoiser, in eval mode."""
        state = self.select_weights(weights)
        if not state and is_bundle(self.path):
            raise UsageError(f"{self.path} is a bundle, with averaged weights alone: no raw=true")
        load_module_state(denoiser, state, what=str(self.path))
        return denoiser.eval()


def load_diffusion_checkpoint(
    ckpt: str, *, name: str = "ckpt", trust: Sequence[str] | None = None
) -> LoadedCheckpoint:
    """The newest checkpoint of a run directory, or a file; name: the setting that it came by.

    trust: see `validate_file_config`. Raises UsageError for another stage's checkpoint,
    CheckpointError for one that is damaged or that names other code than ours.
    """
    hint = f"images are sampled from a diffusion run, which `{format_program('train')}` makes"
    loaded = load_stage_checkpoint(
        ckpt, name=name, stage="diffusion", needed=DIFFUSION_GROUPS, trust=trust, hint=hint
    )
    if STYLE_GROUP in loaded.config:
        check_frozen_digests(loaded.payload["ldm"], loaded.path, [STYLE_GROUP])
    return loaded


def load_stage_checkpoint(
    ckpt: str,
    *,
    name: str,
    stage: str,
    needed: tuple[str, ...],
    trust: Sequence[str] | None,
    hint: str,
) -> LoadedCheckpoint:
    """As `load_diffusion_checkpoint`, for any stage; hint: the end of the message for another."""
    path, copies = resolve_path(ckpt), {}
    if is_bundle(path):
        payload, copies = read_bundle(path)
    else:
        path = find_checkpoint(ckpt, name=name)
        payload = read_checkpoint(path)
    facts = read_checkpoint_metadata(payload, path)
    if facts["stage"] != stage:
        raise UsageError(f"{path} comes from stage={facts['stage']}: {hint}")
    config = validate_file_config(facts["config"], path, needed=needed, trust=trust)
    check_frozen_digests(facts, path, FROZEN_GROUPS)
    for group, location in copies.items():
        set_component_location(config, group, location)
    return LoadedCheckpoint(path, payload, config)


def find_component_location(part: Mapping) -> str | None:
    """Where a frozen component is read from; None where its settings are all of it."""
    place = part.get("path", part.get("names"))
    return place if isinstance(place, str) else None


def set_component_location(cfg: DictConfig, name: str, location: str) -> None:
    """Sets where a frozen component is read from; UsageError if it is not read from anywhere."""
    part = cfg.get(name) or {}
    key = next((key for key in ("path", "names") if key in part), None)
    if key is None:
        raise UsageError(
            f"{name}={location}: the run was trained with {part.get('_target_', 'none')}, which is "
            "read from nowhere: leave it out"
        )
    if "${" in location:
        raise UsageError(f"{location}: a path with ${{ cannot be used here: rename that folder")
    cfg[name][key] = location
