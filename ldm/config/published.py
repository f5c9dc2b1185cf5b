"""Published models: the folder of a diffusers pipeline, or its name on the hub, to our components.

Everything in such a folder is data: settings of known keys, safetensors, and pickles of plain
tensors. Its code is never run.
"""

import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ldm.config.own_components import import_component, list_parameters
from ldm.config.published_settings import (
    PIPELINE_FILE,
    UNUSED_PARTS,
    read_pipeline_index,
    read_published_settings,
)
from ldm.models.diffusers_config import TRAINING_SETTINGS
from ldm.utils.errors import UsageError
from ldm.utils.files import BUNDLE_FILE, resolve_path
from ldm.utils.hub import download_snapshot

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ldm.config.components import LoadedCheckpoint
    from ldm.diffusion.tasks.base import Task
    from ldm.inference.components import Components

PIPELINE_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")  # the folders with weights
# What is downloaded from the hub: settings and tokenizers; the weights are listed by part.
HUB_SETTINGS = ("*.json", "*.txt")
HUB_IGNORED = ("*.non_ema.*", *(f"{part}/*" for part in UNUSED_PARTS))
HUB_NAME_PATTERN = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
CONVERSION_CACHE = Path("data/cache")  # that of servers' shards, and of real images' features
ORIGINAL_SUFFIXES, ORIGINAL_UNET = (".safetensors", ".ckpt"), b"model.diffusion_model."
# Of a text encoder: they choose one of its states. A training may choose another (clip skip).
STATE_SETTINGS = ("layer", "norm", "zero_empty")


def is_published(location: str | os.PathLike[str] | None) -> bool:
    """Whether a location is a diffusers folder, a file from elsewhere, or may be a hub name."""
    if location is None:
        return False
    text = os.path.expanduser(os.fspath(location))
    return Path(text, PIPELINE_FILE).is_file() or is_original(text) or is_hub_name(text)


def is_original(location: str) -> bool:
    """Whether a location is one file of weights from elsewhere, and not of a run."""
    path = Path(location).expanduser()
    is_file = path.suffix in ORIGINAL_SUFFIXES and path.is_file()
    if not is_file or os.path.exists(f"{path}.json"):  # the manifest of a run's checkpoint
        return False
    if path.suffix == ".safetensors":
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            return any(ORIGINAL_UNET in archive.read(name) for name in pickles)
    except (zipfile.BadZipFile, OSError, NotImplementedError):
        return False


@cache  # a command opens a location several times; its notes are logged once
def locate_original(location: str) -> Path:
    """The folder that a file is converted to; CheckpointError for a file that is not opened."""
    from ldm.models.original_layout import open_original_file

    return open_original_file(resolve_path(location), cache=CONVERSION_CACHE.absolute())


def is_of_model(place: str, init: str) -> bool:
    """Whether a path lies in a published model, or in the folder that a file was converted to."""
    cache = os.fspath(CONVERSION_CACHE.absolute() / "original")
    converted = rf"{re.escape(cache)}/{re.escape(Path(init).stem[:100])}-[0-9a-f]{{16}}(/.*)?"
    downloaded = f"models--{init}".replace("/", "--")
    is_inside = Path(place).is_relative_to(resolve_path(init))
    return is_inside or re.fullmatch(converted, place) is not None or downloaded in place.split("/")


def is_hub_name(location: str) -> bool:
    """Whether a location may be a name on the hub, `owner/name`: no such path is here."""
    owner = location.partition("/")[0]
    is_path = owner in (".", "..", "runs") or os.path.isdir(owner) or os.path.lexists(location)
    return HUB_NAME_PATTERN.fullmatch(location) is not None and not is_path


def locate_published(location: str, *, name: str = "ckpt") -> Path:
    """The folder of a published model; a hub name is downloaded, and a file is converted."""
    if is_original(location):
        return locate_original(location)
    if not is_hub_name(location):
        return resolve_path(location)
    folder = _download_published(location, name, variant="")
    for part in PIPELINE_PARTS:
        if (folder / part).is_dir() and not any((folder / part).glob("*.safetensors")):
            return _download_published(location, name, variant="fp16")
    return folder


@cache  # a command opens a location several times
def _download_published(location: str, name: str, *, variant: str) -> Path:
    folder = download_snapshot(
        location,
        [*HUB_SETTINGS, *(f"{part}/*.safetensors" for part in PIPELINE_PARTS)],
        ignored=[*HUB_IGNORED, *([] if variant else ["*.fp16.*", "*.fp16-*"])],
        subject=f"{name}={location}",
        remedy="give a run, a checkpoint or a diffusers folder. Without a network, copy the folder "
        "from a machine that has it, or set HF_HOME to its cache",
    )
    if not (folder / PIPELINE_FILE).is_file():
        raise UsageError(
            f"{name}={location} has no {PIPELINE_FILE}: it is no pipeline of diffusers, or its "
            "download did not finish"
        )
    return folder


def is_foreign_pipeline(location: str) -> bool:
    """Whether a location is a diffusers folder that holds other components than ours, and whole."""
    if not Path(location, PIPELINE_FILE).is_file():
        return False
    try:
        open_published(location)
    except UsageError as error:
        cause = error.__cause__ or error
        is_damaged = isinstance(cause, OSError) or isinstance(cause.__cause__, ValueError)  # JSON
        return not is_damaged
    return False


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A published model whose settings were read; nothing is built yet."""

    path: Path
    config: DictConfig  # the nodes of our groups, and what sizes them
    sampler: DictConfig  # of its scheduler_config.json
    place: str  # as the command names it
    unused: tuple[str, ...] = ()  # its parts that ldm does not use
    step: int = 0

    def hash_frozen(self, name: str) -> str:
        """The digest of its autoencoder or text encoder, which is built for it."""
        from ldm.utils.hashing import hash_module

        return hash_module(instantiate(self.config[name]))

    def build(self, task: "Task") -> "Components":
        """Its components for a task; the denoiser has arbitrary weights."""
        from ldm.config.components import build_components
        from ldm.models.initialization import SkippedInitialization

        with SkippedInitialization():
            return build_components(self.config, task)

    def check_frozen(self, frozen: "dict[str, nn.Module]") -> dict[str, str]:
        """The paths of the frozen components that are not those of the folder, which may be any."""
        places = {name: self.config[name].get("path") for name in frozen}
        return {n: place for n, place in places.items() if not is_of_model(str(place), self.path)}

    def list_differences(self, components: "Components", cfg: DictConfig) -> list[str]:
        """The groups that differ in a training that starts from it; the scheduler may differ."""
        others = [
            name
            for name in components.frozen
            if name in self.config  # a style encoder is new
            and not is_same_part(cfg[name], self.config[name])
            and components.hash_frozen(name) != self.hash_frozen(name)
        ]
        if not is_same_network(cfg.model, self.config.model):
            others.append("model")
        is_inpainting = "mask_resize" in self.config.task
        return [*others, "task"] if is_inpainting and components.task.name != "inpaint" else others

    def format_remedy(self, others: Sequence[str]) -> str:
        """The words of the command line that remove the differences of `list_differences`."""
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
        load_module_state(denoiser, self.read_weights(), what=f"{self.place}: its unet")
        return denoiser.eval()


def is_same_part(node: Mapping, published: Mapping) -> bool:
    """Whether the settings of a frozen component name the same weights as those of another."""
    one, other = (
        {key: value for key, value in each.items() if key not in STATE_SETTINGS}
        for each in (node, published)
    )
    return one == other


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
    """A run's checkpoint, a bundle or a published model; name: the setting that `ckpt` is from."""
    if is_published(ckpt):
        return open_published(ckpt, name=name)
    check_no_part(resolve_path(ckpt), name=name)
    from ldm.config.components import load_diffusion_checkpoint

    return load_diffusion_checkpoint(ckpt, name=name, trust=trust)


def check_no_part(folder: Path, *, name: str) -> None:
    """UsageError for a folder of one network of diffusers, or of a pipeline without its index."""
    if (folder / "checkpoints").is_dir() or (folder / BUNDLE_FILE).is_file():
        return
    if (folder / "config.json").is_file():
        raise UsageError(
            f"{name}={folder} is one network, and no pipeline: give the folder above it, "
            f"{name}={folder.parent}, with {PIPELINE_FILE}; an autoencoder alone is for "
            "autoencoder.path=FOLDER"
        )
    if (folder / "unet" / "config.json").is_file():
        raise UsageError(
            f"{name}={folder} has no {PIPELINE_FILE}: copy it from where the folder comes from"
        )


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
        is_missing = isinstance(error, FileNotFoundError) and error.filename is not None
        why = f"it has no {error.filename}: has its download finished?" if is_missing else error
        raise UsageError(f"{name}={location} cannot be opened: {why}") from error
    sampler = OmegaConf.create(nodes.pop("sampler"))
    return PublishedCheckpoint(folder, OmegaConf.create(nodes), sampler, location, unused)
