"""Caches of latents and text states as the data of a training."""

from pathlib import Path
from typing import Literal

from ldm.data.cached.dataset import CachedDataset
from ldm.data.cached.manifest import CacheError, open_cache, read_manifest
from ldm.data.datamodule import TextImageData
from ldm.data.dataset import TextImageDataset
from ldm.data.shards.data_sets import list_locations
from ldm.data.shards.index import ReadOptions, open_index
from ldm.data.shards.locations import ShardSource
from ldm.data.shards.reader import ShardReader
from ldm.data.shards.selection import MEASURED_COLUMNS
from ldm.data.where import SampleFilter
from ldm.utils.files import resolve_path

# What the training and the validation cache must have in common.
_SHARED = (
    *("autoencoder", "text_encoder", "latent_channels", "factor", "latent_shift", "latent_scale"),
    *("text_parts", "text_width", "pooled_width", "max_length", "posterior"),
)


def cached_data(
    *,
    train: ShardSource,
    val: ShardSource,
    size: int | None = None,
    batch_size: int,
    flip: float = 0.0,
    window: int = 4,
    group: int = 1,
    workers: int = 2,
    val_batch_size: int = 64,
    val_limit: int | None = None,
    on_error: Literal["stop", "skip"] = "stop",
    max_skipped: float = 0.01,
    train_images: ShardSource | None = None,
    val_images: ShardSource | None = None,
    where: str | None = None,
    val_where: str | None = None,
    seed: int = 0,
) -> TextImageData:
    """Returns the samples of two caches of `ldm cache`, in the order of the images they are of.

    size: side of the images, which the caches know. train_images, val_images: the images that they
    were made of, which evaluations compare with. where, val_where: see `ReadOptions`, without the
    sizes of images. Raises CacheError where the caches do not go together, or are none.
    """
    manifests = [open_cache(place) for place in (train, val)]
    for place in dict.fromkeys(one for source in (train, val) for one in list_locations(source)):
        check_cache_keys(place)
    for name in _SHARED:
        one, other = (getattr(manifest, name) for manifest in manifests)
        if one != other:
            raise CacheError(
                f"data.train={train} and data.val={val} are caches of another {name} ({one}, "
                f"{other}): make both by the same settings"
            )
    side = size or manifests[0].size
    for name, condition in {"where": where, "val_where": val_where}.items():
        keys = SampleFilter(condition).keys if condition is not None else ()
        if measured := set(keys).intersection(MEASURED_COLUMNS):
            raise CacheError(
                f"data.{name}: a cache has the {min(measured)} of encoded images: make a cache of "
                "those that meet the condition, ldm cache where=..."
            )
    options = [ReadOptions(on_error=on_error, where=each) for each in (where, val_where)]
    images = [
        place and TextImageDataset(ShardReader(place, each), size=side, seed=seed, train=False)
        for place, each in zip((train_images, val_images), options, strict=True)
    ]
    how = {"seed": seed, "on_error": on_error}
    datasets = [
        CachedDataset(
            ShardReader(place, each),
            manifest=manifest,
            images=real,
            train=is_training,
            flip=flip if is_training else 0.0,
            **how,
        )
        for place, manifest, real, each, is_training in zip(
            (train, val), manifests, images, options, (True, False), strict=True
        )
    ]
    return TextImageData(
        train=train,
        val=val,
        size=side,
        batch_size=batch_size,
        window=window,
        group=group,
        workers=workers,
        val_batch_size=val_batch_size,
        val_limit=val_limit,
        on_error=on_error,
        max_skipped=max_skipped,
        datasets=(datasets[0], datasets[1]),
        seed=seed,
    )


def check_cache_keys(place: str | Path) -> None:
    """CacheError for a cache whose samples are not those that were written, in their order."""
    if read_manifest(resolve_path(place)).keys not in ("", open_index(place).keys_digest):
        raise CacheError(
            f"{place}: the samples of the cache are not those that were written, in their order: "
            "its shards were changed or renamed, make it again"
        )
