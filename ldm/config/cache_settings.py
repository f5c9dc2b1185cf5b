"""The settings of a training from caches, which must fit them; imports no torch."""

from omegaconf import DictConfig, OmegaConf

from ldm.data.cached.manifest import MANIFEST_NAME, Manifest, open_cache
from ldm.data.shards.data_sets import list_locations
from ldm.utils.errors import UsageError
from ldm.utils.files import resolve_path

CACHED_TARGET = "ldm.data.cached.datamodule.cached_data"


def is_cached(cfg: DictConfig) -> bool:
    """Whether a training reads caches."""
    return cfg.data.get("_target_") == CACHED_TARGET


def check_cache_settings(cfg: DictConfig) -> None:
    """UsageError for settings that do not fit a cache, or a cache that is taken for images.

    Sets `data.size` to the size of the cache's images.
    """
    for name in ("train", "val"):
        if (caches := list_caches(cfg, name)) and not is_cached(cfg):
            raise UsageError(
                f"data.{name}={caches[0]} is a cache of latents, and no images: give data=cached "
                "data.train=DIR data.val=DIR"
            )
    if not is_cached(cfg):
        return
    if cfg.stage != "diffusion":
        raise UsageError(
            f"stage={cfg.stage} reads images, and data=cached has latents alone: give data=shards"
        )
    if cfg.style_encoder:
        raise UsageError(
            "style_encoder=.. reads images, and data=cached has latents alone: leave it out, or "
            "give data=shards"
        )
    manifest = open_training_cache(cfg)
    if cfg.posterior == "sample" and manifest.posterior == "mean":
        raise UsageError(
            f"data.train={cfg.data.train} has the means of the latents alone: add posterior=mean, "
            "or make the cache with posterior=moments"
        )
    if cfg.data.size not in (None, manifest.size):
        raise UsageError(
            f"data.size={cfg.data.size}, and data.train={cfg.data.train} is of images of "
            f"{manifest.size} pixels: leave data.size out"
        )
    cfg.data.size = manifest.size


def list_caches(cfg: DictConfig, name: str) -> list[str]:
    """The folders of `data.train` or `data.val` that are caches; UsageError for no data set."""
    try:
        places = [str(place) for place in list_locations(cfg.data.get(name) or [])]
    except ValueError as error:
        raise UsageError(f"data.{name}: {error}") from None
    return [place for place in places if (resolve_path(place) / MANIFEST_NAME).is_file()]


def open_training_cache(cfg: DictConfig) -> Manifest:
    """The manifest of `data.train`."""
    return open_cache(OmegaConf.to_container(cfg.data)["train"])
