"""Configuration to a cache of latents and text states: its source, its encoders, its manifest."""

import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from tqdm import tqdm

from ldm.config.command_line import TextOptions, require_option
from ldm.config.components import FROZEN_GROUPS, build_frozen_encoders
from ldm.config.pipeline import explain_moved_component
from ldm.config.published import open_checkpoint
from ldm.config.sample_options import print_on_first_rank, select_device
from ldm.config.trust import list_trusted_packages
from ldm.data.bad_samples import format_skip_counts
from ldm.data.buckets import Buckets, choose_buckets
from ldm.data.cached.format import DTYPE_BY_NAME
from ldm.data.cached.manifest import Manifest
from ldm.data.cached.source import CacheSource
from ldm.data.cached.writer import (
    CacheShard,
    claim_cache_folder,
    complete_manifest,
    plan_cache_shards,
    write_cache_shards,
)
from ldm.data.dataset import TextImageDataset
from ldm.data.image_decoding import read_image_size
from ldm.data.pixel_area import compute_square_side, parse_pixels
from ldm.data.shards.cache import ShardCache
from ldm.data.shards.index import ReadOptions
from ldm.data.shards.reader import ShardReader
from ldm.experiments.run_dir import get_launcher_layout, get_launcher_rank
from ldm.inference.encoding import CacheEncoder, CacheSamples
from ldm.models.base import TextEncoder
from ldm.utils.errors import UsageError
from ldm.utils.hashing import hash_module
from ldm.utils.text import get_progress_interval

PIXELS_VERSION = "square-1"  # of `read_box` at the centre, of squares
BUCKETS_VERSION = "box-1"  # of `read_box` at the centre, of other sizes
TAR_BYTES = 2560  # of a sample in a shard besides its tensors: two headers, padding, the record
# The settings that choose the samples and captions of the source.
READING_SETTINGS = ("min_size", "caption_key", "captions", "on_error")
Posterior = Callable[[Tensor], tuple[Tensor, Tensor | None]]


def write_cache(cfg: DictConfig, options: TextOptions) -> tuple[CacheSource, CacheEncoder]:
    """Writes what is missing of the cache `out`, and returns what it was made with."""
    out, device = Path(require_option(options, "out")), choose_cache_device(cfg.device)
    autoencoder, text_encoder, parts = build_cache_encoders(cfg, options, device)
    images, buckets = open_cache_images(cfg, options, autoencoder.factor)
    source = CacheSource(images, cfg.max_captions)
    encoder, null = build_cache_encoder(cfg, source, autoencoder, text_encoder, device)
    facts = {
        "reading": list_reading_settings(cfg, options),
        "parts": OmegaConf.to_container(parts, resolve=True),
        "buckets": buckets and [list(size) for size in buckets.sizes],
        "pixels": BUCKETS_VERSION if buckets else PIXELS_VERSION,
    }
    encoder = replace(encoder, manifest=replace(encoder.manifest, **facts))
    shards = plan_cache_shards(out, images.shards.index)
    claim_cache_folder(out, encoder.manifest, null)
    is_first = get_launcher_rank() == 0
    if is_first:
        print(format_cache_estimate(out, encoder, source), flush=True)
        if buckets:
            print(buckets.describe(), flush=True)
    with tqdm(
        total=len(source),
        desc="Encoding",
        unit="image",
        disable=not is_first,
        mininterval=get_progress_interval(),
    ) as bar:
        samples = CacheSamples(
            source, encoder, workers=cfg.workers, on_error=cfg.on_error, on_encoded=bar.update
        )
        world = prod(get_launcher_layout() or (1, 1))
        start = get_launcher_rank() * len(shards) // world
        write_cache_shards(shards, samples, start=start, on_finished=bar.update)
    manifest = complete_manifest(out, encoder.manifest, shards)
    print_on_first_rank(format_cache_report(out, manifest, shards, source))
    if text_encoder.truncated:
        print(
            f"{text_encoder.truncated} captions were cut to {text_encoder.max_length} tokens",
            file=sys.stderr,
        )
    return source, encoder


def choose_cache_device(name: str | None) -> torch.device:
    """The device of this process; of several processes on a machine, each has a GPU of its own."""
    device = select_device(name)
    if device.type == "cuda" and device.index is None:
        local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
        device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return device


def open_cache_images(
    cfg: DictConfig, options: TextOptions, factor: int
) -> tuple[TextImageDataset, Buckets | None]:
    """The images of `data`, as validations during a training read them, and their buckets."""
    place = require_option(options, "data")
    is_list = place.startswith("[") and place.endswith("]")
    places = [part.strip() for part in place[1:-1].split(",")] if is_list else place
    cache = ShardCache(cfg.cache, gigabytes=cfg.cache_gb) if cfg.cache else None
    reading, has_buckets = list_reading_settings(cfg, options), cfg.buckets is not None
    shards = ShardReader(places, ReadOptions(**reading, measure=has_buckets, cache=cache))
    pixels = cfg.pixels or (cfg.size and cfg.size**2)
    if has_buckets and cfg.buckets == "auto" and pixels is None:
        raise UsageError("buckets=auto needs the area of the images: give pixels=512*512")
    size = cfg.size or (has_buckets and compute_square_side(cfg.pixels, cfg.buckets))
    size = size or find_common_size(shards)
    images = TextImageDataset(
        shards, size=size, seed=0, train=False, fast_pixels=True, gives_sizes=True
    )
    if not has_buckets:
        if cfg.pixels is not None:
            raise UsageError(f"pixels={cfg.pixels} is for buckets: add buckets=auto, or give size=")
        return images, None
    sizes = cfg.buckets if cfg.buckets == "auto" else OmegaConf.to_container(cfg.buckets)
    fixed = [] if sizes == "auto" else sizes
    if wrong := [pair for pair in fixed if pair[0] % factor or pair[1] % factor]:
        raise UsageError(
            f"buckets has {wrong[0]}: sides are multiples of {factor}, the autoencoder's factor"
        )
    known = shards.index.sizes
    buckets, _ = choose_buckets(
        known,
        known[:0],
        sizes,
        side=size,
        pixels=parse_pixels(pixels or size**2),
        grid=cfg.grid or choose_grid(size, factor),
        batch=cfg.batch,
    )
    return replace(images, target_sizes=buckets.target_sizes), buckets


def choose_grid(side: int, factor: int) -> int:
    """What sides of buckets are multiples of, where no network says it: 8 times the factor.

    That fits Stable Diffusion's network. Smaller images have 4, 2 or 1 times the factor, so that a
    side has four of these if it can.
    """
    steps = min(8, max(1, side // (4 * factor)))
    return factor * 2 ** (steps.bit_length() - 1)


def list_reading_settings(cfg: DictConfig, options: TextOptions) -> dict:
    """The settings that choose the samples and captions of the source, as plain values."""
    found = {name: cfg[name] for name in READING_SETTINGS} | {"where": options["where"]}
    return OmegaConf.to_container(OmegaConf.create(found))


def find_common_size(shards: ShardReader) -> int:
    """The short side of some images; UsageError where they differ."""
    few = range(0, len(shards), len(shards) // 64 + 1)
    sides = sorted({min(read_image_size(shards.read(i).image)) for i in few})
    if len(sides) != 1:
        raise UsageError(
            f"size is needed, for the images have short sides of {sides[0]} to {sides[-1]} pixels: "
            "give size=256, the side of the squares that are encoded"
        )
    return sides[0]


def build_cache_encoders(
    cfg: DictConfig, options: TextOptions, device: torch.device
) -> tuple[nn.Module, nn.Module, DictConfig]:
    """Autoencoder and text encoder of `ckpt`, or of the groups without one, and their settings."""
    loaded = None
    if options["ckpt"]:
        loaded = open_checkpoint(options["ckpt"], trust=list_trusted_packages(cfg))
    parts = loaded.config if loaded else cfg
    with explain_moved_component(parts):
        encoders = build_frozen_encoders(parts)
    if loaded:
        loaded.check_frozen(dict(zip(FROZEN_GROUPS, encoders, strict=True)))
    for part in encoders:
        part.to(device).requires_grad_(False)
    return *encoders, OmegaConf.masked_copy(parts, list(FROZEN_GROUPS))


def find_posterior(autoencoder: nn.Module) -> tuple[Posterior, Tensor, Tensor]:
    """The posterior of an autoencoder, and the shift and scale (C,) of its latents.

    One without a posterior gives its scaled latents, which are then neither shifted nor scaled.
    """
    if hasattr(autoencoder, "posterior"):
        return autoencoder.posterior, autoencoder.shift, autoencoder.scale
    channels = autoencoder.channels

    def encode(images: Tensor) -> tuple[Tensor, None]:
        return autoencoder.encode(images), None

    return encode, torch.zeros(channels), torch.ones(channels)


def build_cache_encoder(
    cfg: DictConfig,
    source: CacheSource,
    autoencoder: nn.Module,
    text_encoder: TextEncoder,
    device: torch.device,
) -> tuple[CacheEncoder, dict[str, Tensor]]:
    """The encoder, with the manifest of its cache, and the parts of the null condition."""
    posterior, shift, scale = find_posterior(autoencoder)
    size, factor = source.images.size, autoencoder.factor
    if source.images.target_sizes is None and size % factor:
        below = size // factor * factor
        raise UsageError(
            f"size={size} is no multiple of {factor}, the autoencoder's factor: give "
            f"size={below or factor} or {below + factor}"
        )
    probe = torch.zeros(1, 3, 8 * factor, 8 * factor, device=device)
    with torch.inference_mode():
        if cfg.posterior == "moments" and posterior(probe)[1] is None:
            raise UsageError(
                "posterior=moments: the latents of this autoencoder have no variance: give "
                "posterior=mean"
            )
        null = text_encoder.null(1)
    names = [name for name in ("tokens", "mask", "pooled") if getattr(null, name) is not None]
    manifest = Manifest(
        autoencoder=hash_module(autoencoder),
        text_encoder=hash_module(text_encoder),
        pixels=PIXELS_VERSION,
        source=source.images.shards.index.fingerprint,
        posterior=cfg.posterior,
        dtype={"bfloat16": "bf16"}.get(cfg.dtype, cfg.dtype),
        precision=cfg.precision,
        captions=cfg.max_captions or "all",
        flips=cfg.flips,
        size=size,
        latent_channels=autoencoder.channels,
        factor=factor,
        latent_shift=shift.tolist(),
        latent_scale=scale.tolist(),
        text_parts=names,
        text_width=text_encoder.width or None,
        pooled_width=text_encoder.pooled_width or None,
        max_length=text_encoder.max_length or None,
    )
    encoder = CacheEncoder(posterior, text_encoder, manifest, device=device, batch=cfg.batch)
    return encoder, encoder.encode_null()


def count_sample_bytes(manifest: Manifest, captions: float) -> float:
    """The bytes of a sample in a shard, with so many captions."""
    width = DTYPE_BY_NAME[manifest.dtype].itemsize
    latents = sum(w * h for w, h in manifest.image_sizes) / len(manifest.image_sizes)
    latents *= manifest.latent_channels / manifest.factor**2 * len(manifest.latent_parts)
    length, numbers = manifest.max_length or 1, 0
    numbers += length * (manifest.text_width or 0) if "tokens" in manifest.text_parts else 0
    numbers += manifest.pooled_width or 0 if "pooled" in manifest.text_parts else 0
    mask = length if "mask" in manifest.text_parts else 0
    return width * latents + captions * (width * numbers + mask) + TAR_BYTES


def format_cache_estimate(out: Path, encoder: CacheEncoder, source: CacheSource) -> str:
    """A line before the work: how many images, and how much space they will take."""
    shards, count = source.images.shards, len(source)
    few = range(0, count, count // 64 + 1)
    captions = sum(len(shards.read(i).captions[: source.max_captions]) for i in few) / len(few)
    each = count_sample_bytes(encoder.manifest, captions)
    free = shutil.disk_usage(out).free
    warning = ", which is too little" if free < each * count else ""
    return (
        f"{count} images with {captions:.3g} captions each: about {format_bytes(each * count)} in "
        f"{out}, {format_bytes(each)} an image; {format_bytes(free)} are free there{warning}"
    )


def format_cache_report(
    out: Path, manifest: Manifest, shards: list[CacheShard], source: CacheSource
) -> str:
    """A line after the work."""
    size = sum(shard.tar.stat().st_size for shard in shards)
    line = f"{manifest.samples} samples in {out}, {format_bytes(size)}"
    if manifest.skipped:
        reasons = format_skip_counts(Counter(manifest.skipped))
        line += (
            f"; left out: {reasons}, listed in {out}/*_stats.json: the order of a training differs "
            "from that of the images"
        )
    elif manifest.keys != source.images.shards.index.keys_digest:
        line += (
            "; its shards are read in the order of their names, and those of data=.. were not: the "
            "order of a training differs from that of the images"
        )
    return line


def format_bytes(count: float) -> str:
    """A number of bytes, in units of 1000."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB" if count < 1000 else f"{count / 1000:.3g} TB"
