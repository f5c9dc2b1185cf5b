"""A small cache of latents and text states, made of shards by the packaged encoders."""

from pathlib import Path

import torch
from omegaconf import OmegaConf
from safetensors.torch import save

from ldm.config.components import build_frozen_encoders
from ldm.config.composition import compose_default_config
from ldm.data.cached.format import DTYPE_BY_NAME, pack_record, pack_sample
from ldm.data.cached.manifest import NULL_NAME, Manifest, write_manifest
from ldm.data.dataset import TextImageDataset
from ldm.data.shards.reader import ShardReader, write_shard
from ldm.utils.hashing import hash_bytes, hash_module


@torch.no_grad()
def write_cache(
    folder: Path,
    shards: str,
    *,
    size: int = 64,
    dtype: str = "float32",
    posterior: str = "moments",
    flips: bool = False,
    batch: int = 8,
) -> Manifest:
    cfg = OmegaConf.create(compose_default_config("train", []))
    autoencoder, text_encoder = build_frozen_encoders(cfg)
    reader = ShardReader(shards)
    images = TextImageDataset(reader, size=size, seed=0, train=False, fast_pixels=True)
    sizes, done = reader.index.shard_sizes(), 0
    folder.mkdir()
    number = DTYPE_BY_NAME[dtype]
    kinds = ("mean", "logvar")[: 2 if posterior == "moments" else 1]
    for path, count in zip(reader.index.paths, sizes, strict=True):
        members = []
        for first in range(done, done + count, batch):
            at = [(i, i) for i in range(first, min(first + batch, done + count))]
            pixels = images.read_batch(at)["images"].float() / 127.5 - 1
            turns = {"": pixels, **({"_flipped": pixels.flip(-1)} if flips else {})}
            latents = {
                f"{kind}{turn}": part
                for turn, each in turns.items()
                for kind, part in zip(kinds, autoencoder.posterior(each), strict=False)
            }
            samples = [reader.read(i) for i, _ in at]
            texts = text_encoder([text for one in samples for text in one.captions])
            counts = [len(one.captions) for one in samples]
            states = {"tokens": texts.tokens, "mask": texts.mask, "pooled": texts.pooled}
            split = {name: part.split(counts) for name, part in states.items() if part is not None}
            for n, sample in enumerate(samples):
                tensors = {name: part[n].to(number) for name, part in latents.items()}
                tensors |= {name: part[n].to(number) for name, part in split.items()}
                if "mask" in tensors:
                    tensors["mask"] = tensors["mask"].to(torch.uint8)
                record = pack_record(
                    {},
                    captions=sample.captions,
                    weights=sample.weights,
                    digest=hash_bytes(sample.image),
                    sizes=(size, size, 0, 0, size, size),
                )
                members.append((sample.key, pack_sample(tensors, record)))
        write_shard(folder / Path(path).name, members)
        done += count
    null = text_encoder.null(1)
    parts = {"tokens": null.tokens, "mask": null.mask, "pooled": null.pooled}
    parts = {name: part.to(number) for name, part in parts.items() if part is not None}
    if "mask" in parts:
        parts["mask"] = parts["mask"].to(torch.uint8)
    (folder / NULL_NAME).write_bytes(save({k: v.contiguous() for k, v in parts.items()}))
    manifest = Manifest(
        state="complete",
        autoencoder=hash_module(autoencoder),
        text_encoder=hash_module(text_encoder),
        pixels="square-1",
        source=reader.index.fingerprint,
        posterior=posterior,
        dtype=dtype,
        captions="all",
        flips=flips,
        size=size,
        latent_channels=autoencoder.channels,
        factor=autoencoder.factor,
        latent_shift=autoencoder.shift.tolist(),
        latent_scale=autoencoder.scale.tolist(),
        text_parts=list(parts),
        text_width=text_encoder.width,
        pooled_width=text_encoder.pooled_width,
        max_length=text_encoder.max_length,
        samples=len(reader),
        parts={name: OmegaConf.to_container(cfg[name]) for name in ("autoencoder", "text_encoder")},
    )
    write_manifest(folder, manifest)
    return manifest
