"""Published models: the folder of a diffusers pipeline, or its name on the hub, to our components.

Everything in such a folder is data: settings of known keys, safetensors, and pickles of plain
tensors. Its code is never run.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from ldm.config.original_files import is_original, locate_original
from ldm.config.own_components import import_component, list_parameters
from ldm.utils.errors import UsageError
from ldm.utils.files import read_json, resolve_path

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ldm.config.components import LoadedCheckpoint
    from ldm.inference.components import Components

PIPELINE_FILE = "model_index.json"
PIPELINE_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")  # the folders with weights
# Class names of diffusers: those that are opened, and why others are not.
STABLE_DIFFUSION_XL = "StableDiffusionXLPipeline"
OPENED_PIPELINES = {
    "StableDiffusionPipeline": "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline": "StableDiffusionPipeline",
    "StableDiffusionInpaintPipeline": "StableDiffusionPipeline",
    STABLE_DIFFUSION_XL: STABLE_DIFFUSION_XL,
    "StableDiffusionXLImg2ImgPipeline": STABLE_DIFFUSION_XL,
    "StableDiffusionXLInpaintPipeline": STABLE_DIFFUSION_XL,
}
REFUSED_PIPELINES = (  # the beginning of a name, and the reason
    ("StableDiffusionUpscale", "the x4 upscaler, which also reads a small image and its noise"),
    ("StableDiffusionLatentUpscale", "an upscaler of latents"),
    ("StableDiffusionDepth", "whose network also reads a depth map"),
    ("StableDiffusionInstructPix2Pix", "whose network also reads the image that it edits"),
    ("StableDiffusion3", "a transformer (MMDiT), not a UNet"),
    ("Flux", "a transformer (MMDiT), not a UNet"),
    ("StableDiffusionControlNet", "a network with a second one, ControlNet, beside it"),
    ("StableDiffusionXLControlNet", "a network with a second one, ControlNet, beside it"),
)
NEEDED_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
TWO_ENCODER_PARTS = ("text_encoder_2", "tokenizer_2")
UNUSED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")
INDEX_SETTINGS = ("requires_safety_checker", "add_watermarker", "force_zeros_for_empty_prompt")
INDEX_SETTINGS += ("requires_aesthetics_score",)
PART_CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
}
# What a hub name fetches: settings, tokenizers and the weights of the parts, all without code.
HUB_SETTINGS = ("*.json", "*.txt")
HUB_IGNORED = ("*.non_ema.*", *(f"{part}/*" for part in UNUSED_PARTS))
HUB_NAME_PATTERN = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
# How such networks are trained; sampling does not read it.
TRAINING_NODES = {
    "weighting": {"_target_": "ldm.diffusion.weightings.UniformWeighting"},
    "loss": {"_target_": "ldm.diffusion.losses.SquaredLoss"},
    "timestep_sampler": {
        "_target_": "ldm.diffusion.timesteps.PowerTimestepSampler",
        "power": 1.0,
        "spread": "independent",
    },
}
DEFAULT_SAMPLE_SIZE = 64  # of latents, where a config.json says none
# Of the network; other settings decide how it is trained.
TRAINING_SETTINGS = ("checkpointing", "dropout", "linear_projections")


def is_published(location: str | os.PathLike[str] | None) -> bool:
    """Whether a location is a diffusers folder, a file from elsewhere, or may be a hub name."""
    if location is None:
        return False
    text = os.path.expanduser(os.fspath(location))
    return Path(text, PIPELINE_FILE).is_file() or is_original(text) or is_hub_name(text)


def is_hub_name(location: str) -> bool:
    """Whether a location may be a name on the hub, `owner/name`: no such path is here."""
    owner = location.partition("/")[0]
    is_path = owner in (".", "..", "runs") or os.path.isdir(owner) or os.path.lexists(location)
    return HUB_NAME_PATTERN.fullmatch(location) is not None and not is_path


def locate_published(location: str, *, name: str = "ckpt") -> Path:
    """The folder of a published model: a hub name's is downloaded, a file is converted to one."""
    if is_original(location):
        return locate_original(location)
    if not is_hub_name(location):
        return resolve_path(location)
    folder = _download_published(location, name, variant="")
    for part in PIPELINE_PARTS:
        if (folder / part).is_dir() and not any((folder / part).glob("*.safetensors")):
            return _download_published(location, name, variant="fp16")
    return folder


def _download_published(location: str, name: str, *, variant: str) -> Path:
    from huggingface_hub import snapshot_download  # slow to import

    patterns = [*HUB_SETTINGS, *(f"{part}/*.safetensors" for part in PIPELINE_PARTS)]
    ignored = [*HUB_IGNORED, *([] if variant else ["*.fp16.*", "*.fp16-*"])]
    try:
        folder = snapshot_download(location, allow_patterns=patterns, ignore_patterns=ignored)
    except Exception as error:
        raise UsageError(
            f"{name}={location} is neither here nor to be had from huggingface.co "
            f"({type(error).__name__}): give a run, a checkpoint or a diffusers folder. Without a "
            "network, copy the folder from a machine that has it, or set HF_HOME to its cache"
        ) from error
    if not Path(folder, PIPELINE_FILE).is_file():
        raise UsageError(
            f"{name}={location} has no {PIPELINE_FILE}: it is no pipeline of diffusers, or its "
            "download did not finish"
        )
    return Path(folder)


def is_foreign_pipeline(location: str) -> bool:
    """Whether a location is a diffusers folder that holds other components than ours."""
    if not Path(location, PIPELINE_FILE).is_file():
        return False
    try:
        open_published(location)
    except UsageError:
        return True
    return False


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A published model whose settings were read; nothing is built yet."""

    path: Path
    config: DictConfig  # the nodes of our groups, and what sizes them
    sampler: DictConfig  # of its scheduler_config.json
    unused: tuple[str, ...] = ()  # its parts that are left out
    step: int = 0

    @cached_property
    def digests(self) -> dict[str, str]:
        """The digests of its autoencoder and text encoder, which are built for it."""
        from ldm.config.components import build_frozen_encoders
        from ldm.utils.hashing import hash_module

        parts = build_frozen_encoders(self.config)
        return dict(zip(("autoencoder", "text_encoder"), map(hash_module, parts), strict=True))

    def check_frozen(self, frozen: "dict[str, nn.Module]") -> dict[str, str]:
        """The places of frozen components that are not the folder's own; any may be given."""
        places = {name: self.config[name].get("path") for name in frozen}
        own = str(self.path)
        return {name: place for name, place in places.items() if not str(place).startswith(own)}

    def list_differences(self, components: "Components", cfg: DictConfig | None) -> list[str]:
        """The groups in which a training that starts from it differs; another scheduler may."""
        from ldm.utils.hashing import hash_module

        others = [
            name
            for name, part in components.frozen.items()
            if (cfg is None or cfg[name] != self.config.get(name))
            and hash_module(part) != self.digests.get(name)
        ]
        if cfg is not None and not is_same_network(cfg.model, self.config.model):
            others.append("model")
        is_inpainting = "mask_resize" in self.config.task
        return [*others, "task"] if is_inpainting and components.task.name != "inpaint" else others

    def format_remedy(self, others: Sequence[str]) -> str:
        """What to give for `list_differences`."""
        if "task" in others:
            return "add task=inpaint"
        words = ", ".join(f"{name}=.." for name in others)
        return f"leave {words} out, and the folder's are taken"

    def read_weights(self) -> "dict[str, Tensor]":
        """The weights of the network, by our names."""
        from ldm.models.diffusers_format import read_unet_state

        return read_unet_state(self.path / "unet")

    def load_denoiser(self, denoiser: "nn.Module", weights: str) -> "nn.Module":
        """Puts the weights into a denoiser, in eval mode; UsageError for those without EMA."""
        from ldm.utils.checkpoint_file import load_module_state

        if weights != "ema.module.":
            raise UsageError(f"{self.path} holds one set of weights: leave raw=true out")
        load_module_state(denoiser, self.read_weights(), what=str(self.path / "unet"))
        return denoiser.eval()


def is_same_network(node: DictConfig, published: DictConfig) -> bool:
    """Whether the settings of a UNet are those of a published one, with its defaults."""
    if node._target_ != published._target_:
        return False
    parameters = list_parameters(import_component(node._target_, "model"))
    usual = {each.name: each.default for each in parameters}
    have, want = map(OmegaConf.to_container, (node, published))
    ours, theirs = usual | have, usual | want
    keys = [key for key in want if key not in ("_target_", *TRAINING_SETTINGS)]
    return all(_to_plain(ours[key]) == _to_plain(theirs[key]) for key in keys)


def _to_plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def open_checkpoint(
    ckpt: str, *, name: str = "ckpt", trust: Sequence[str] | None = None
) -> "LoadedCheckpoint | PublishedCheckpoint":
    """A run's checkpoint or a bundle, or a published model; name: the setting that it came by."""
    if is_published(ckpt):
        return open_published(ckpt, name=name)
    from ldm.config.components import load_diffusion_checkpoint

    return load_diffusion_checkpoint(ckpt, name=name, trust=trust)


def open_published(location: str, *, name: str = "ckpt") -> PublishedCheckpoint:
    """The settings of a diffusers folder, or of a hub name, as a checkpoint of our components.

    Raises UsageError where it holds something that our components are not.
    """
    folder = locate_published(location, name=name)
    try:
        kind, unused = read_pipeline_index(folder)
        nodes = read_published_settings(folder, kind)
    except (OSError, ValueError, LookupError, TypeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{name}={location} cannot be opened: {error}") from error
    sampler = OmegaConf.create(nodes.pop("sampler"))
    return PublishedCheckpoint(folder, OmegaConf.create(nodes), sampler, unused)


def read_pipeline_index(folder: Path) -> tuple[str, tuple[str, ...]]:
    """The kind of a folder's pipeline and its parts that are not used; ValueError for another."""
    index = read_json(folder / PIPELINE_FILE)
    name = index.get("_class_name")
    reason = next((why for start, why in REFUSED_PIPELINES if str(name).startswith(start)), None)
    if (kind := OPENED_PIPELINES.get(name)) is None:
        why = f", {reason}" if reason else ""
        raise ValueError(f"it is a {name!s:.80}{why}. Opened are {', '.join(OPENED_PIPELINES)}")
    parts = {key: value for key, value in index.items() if isinstance(value, list)}
    parts = {key: value for key, value in parts.items() if value and value[-1] is not None}
    if kind == STABLE_DIFFUSION_XL and "text_encoder" not in parts:
        raise ValueError("it is the refiner of SDXL, with one text encoder: it refines images only")
    needed = NEEDED_PARTS + (TWO_ENCODER_PARTS if kind == STABLE_DIFFUSION_XL else ())
    if missing := [part for part in needed if part not in parts]:
        raise ValueError(f"its {PIPELINE_FILE} names no {', '.join(missing)}")
    known = (*needed, *UNUSED_PARTS)
    settings = [key for key in index if key not in parts and index[key] not in (None, [None, None])]
    unknown = [key for key in settings if key[0] != "_" and key not in INDEX_SETTINGS]
    if unknown := [*(part for part in parts if part not in known), *unknown]:
        raise ValueError(f"its {PIPELINE_FILE} has {', '.join(unknown)}, which is not read here")
    for part, classes in PART_CLASSES.items():
        if part in parts and parts[part][-1] not in classes:
            raise ValueError(f"its {part} is a {parts[part][-1]}, and no {classes[0]}")
    return kind, tuple(part for part in UNUSED_PARTS if part in parts)


def read_published_settings(folder: Path, kind: str) -> dict:
    """The nodes of our groups that a folder's settings are, as plain values; ValueError for others.

    `data` and `trainer` hold what sizes and types a model, as in the configuration of a run.
    """
    from ldm.config.diffusers_scheduler import change_as_pipeline, read_scheduler_config
    from ldm.models.diffusers_format import read_autoencoder_settings, read_unet_settings

    unet, vae = (read_json(folder / part / "config.json") for part in ("unet", "vae"))
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    settings = read_unet_settings(unet)
    sizes = {key: settings.pop(key) for key in ("in_channels", "out_channels")}
    for key in ("context_dim", "pooled_dim"):  # the text encoder decides them
        settings.pop(key, None)
    if vae.get("_class_name", "AutoencoderKL") == "AutoencoderKL":
        autoencoder = {"_target_": "ldm.models.diffusers_format.make_autoencoder_kl"}
        autoencoder |= {"path": str(folder / "vae"), **read_autoencoder_settings(vae)}
    else:
        autoencoder = {"_target_": "ldm.models.diffusers_autoencoder.DiffusersAutoencoder"}
        autoencoder |= {"path": str(folder / "vae")}
    factor = 2 ** (len(vae.get("block_out_channels", (1, 1, 1, 1))) - 1)
    side = unet.get("sample_size") or DEFAULT_SAMPLE_SIZE
    side = side[-1] if isinstance(side, list) else side
    return {
        "autoencoder": autoencoder,
        "text_encoder": make_text_encoder_node(folder, kind),
        "model": {"_target_": "ldm.models.unet.UNet", **settings},
        **read_scheduler_config(
            scheduler if kind == STABLE_DIFFUSION_XL else change_as_pipeline(scheduler)
        ),
        **TRAINING_NODES,
        "task": make_task_node(**sizes),
        "data": {"size": side * factor, "batch_size": 1, "frames": None},
        "trainer": {"precision": "32-true"},
        "rng": "torch",  # of diffusers: a seed gives the picture that it gives there
    }


def make_text_encoder_node(folder: Path, kind: str) -> dict:
    """The node of the text encoder, or of the two, of a folder."""
    if kind == STABLE_DIFFUSION_XL:
        target = "ldm.models.text.paired.PairedTextEncoder"
        zeros = read_json(folder / PIPELINE_FILE).get("force_zeros_for_empty_prompt", True)
        return {"_target_": target, "path": str(folder), "layer": -2, "zero_empty": zeros}
    target = "ldm.models.text.clip.ClipTextEncoder"
    return {"_target_": target, "path": str(folder), "pooled": False}


def make_task_node(in_channels: int, out_channels: int) -> dict:
    """The node of the task whose network has these channels; ValueError where there is none."""
    if in_channels == out_channels:
        return {"_target_": "ldm.diffusion.tasks.text_to_image.TextToImage"}
    if in_channels == 2 * out_channels + 1:
        target = "ldm.diffusion.tasks.inpainting.Inpainting"
        return {"_target_": target, "mask_resize": "nearest"}
    raise ValueError(
        f"its network has {in_channels} input channels for {out_channels} of latents, which is "
        "neither text to image nor inpainting"
    )
