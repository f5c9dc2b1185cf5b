"""The components of a training from a cache, whose encoders are built where they are used."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ldm.config.cache_settings import open_training_cache
from ldm.config.components import FROZEN_GROUPS, build_components
from ldm.config.suggestions import suggest_overrides
from ldm.data.cached.format import MAX_SAMPLE_BYTES, unpack_null
from ldm.data.cached.manifest import NULL_NAME, CacheError, Manifest
from ldm.data.shards.data_sets import list_locations
from ldm.diffusion.tasks.base import Task
from ldm.inference.components import Components
from ldm.models.deferred_encoders import DeferredAutoencoder, DeferredModule, DeferredTextEncoder
from ldm.utils.errors import UsageError
from ldm.utils.files import read_regular_file, resolve_path
from ldm.utils.hashing import hash_module


def check_same_part(cfg: DictConfig, name: str, node: Mapping | None, digest: str) -> None:
    """UsageError where the settings name another encoder than `node`, the cache's, with a digest.

    One that is named otherwise is built once to be compared.
    """
    if node is None or OmegaConf.to_container(cfg[name], resolve=True) == node:
        return
    try:
        with torch.random.fork_rng(devices=[]):  # the denoiser's weights are drawn next
            same = hash_module(instantiate(cfg[name])) == digest
    except (ValueError, OSError, InstantiationException):
        same = False
    if not same:
        words = " ".join(suggest_overrides(OmegaConf.create({name: node}), name))
        raise UsageError(
            f"data.train={cfg.data.train} was made with another {name} than the settings name: add "
            f"{words}, or make the cache again"
        )


def build_cached_components(cfg: DictConfig, task: Task) -> Components:
    """The components of a training from a cache, whose encoders are built where they are used."""
    reads_images = task.needs_image or task.is_video or task.extra_channels(1)
    if reads_images or type(task).training_pair is not Task.training_pair:
        raise UsageError(
            f"task={task.name} reads images, and data=cached has latents alone: give data=shards, "
            "or task=text2img"
        )
    manifest = open_training_cache(cfg)
    folder = resolve_path(list_locations(OmegaConf.to_container(cfg.data)["train"])[0])
    digests = {name: getattr(manifest, name) for name in FROZEN_GROUPS}
    null = read_null(folder / NULL_NAME, manifest)
    deferred = {
        name: DeferredModule(partial(instantiate, cfg[name]), digest=digest, name=name)
        for name, digest in digests.items()
    }
    for name, digest in digests.items():
        check_same_part(cfg, name, manifest.parts.get(name), digest)
    draw_initial_weights(cfg.autoencoder)
    autoencoder = DeferredAutoencoder(
        deferred["autoencoder"],
        channels=manifest.latent_channels,
        factor=manifest.factor,
        shift=manifest.latent_shift,
        scale=manifest.latent_scale,
    )
    text_encoder = DeferredTextEncoder(
        deferred["text_encoder"],
        width=manifest.text_width or 0,
        pooled_width=manifest.pooled_width or 0,
        max_length=manifest.max_length or 0,
        null=null,
    )
    components = build_components(cfg, task, encoders=(autoencoder, text_encoder))
    multiple = manifest.factor * components.denoiser.multiple
    for width, height in manifest.image_sizes:
        if width % multiple or height % multiple:
            raise UsageError(
                f"data.train={cfg.data.train} has images of {width} x {height} pixels, and this "
                f"network takes multiples of {multiple}: make the cache with such sizes, or with "
                f"buckets=auto grid={multiple}"
            )
    return replace(components, known_digests=digests)


def read_null(path: Path, manifest: Manifest) -> dict[str, Tensor]:
    """The parts of the null condition of a cache; CacheError where the file is damaged."""
    if not manifest.text_parts:
        return {}
    try:
        return unpack_null(read_regular_file(path, max_bytes=MAX_SAMPLE_BYTES), manifest)
    except (OSError, ValueError) as error:
        raise CacheError(f"{path} {error}: make the cache again") from error


def draw_initial_weights(node: Mapping) -> None:
    """Draws the random numbers that an autoencoder's weights begin with, before its file is read.

    The denoiser's initial weights, which come next, are then those of a training from images.
    """
    if str(node["_target_"]).endswith(".make_autoencoder_kl"):
        instantiate(node, path=None)
