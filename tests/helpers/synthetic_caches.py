"""Caches of random numbers, which no encoder made, for tests of how they are read."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from ldm.data.cached.dataset import CachedDataset
from ldm.data.cached.format import DTYPE_BY_NAME, pack_record, pack_sample
from ldm.data.cached.manifest import NULL_NAME, Manifest, read_manifest, write_manifest
from ldm.data.shards.index import ReadOptions
from ldm.data.shards.reader import ShardReader, write_shard

CHANNELS, FACTOR, LENGTH, WIDTH, POOLED = 3, 8, 5, 6, 4


def make_tensors(number: int, captions: int, grid: tuple[int, int], **how) -> dict:
    draw = torch.Generator().manual_seed(number)
    dtype = DTYPE_BY_NAME[how["dtype"]]

    def normal(*shape):
        return torch.randn(shape, generator=draw).to(dtype)

    kinds = ("mean", "logvar")[: 2 if how["posterior"] == "moments" else 1]
    turns = ("", "_flipped") if how["flips"] else ("",)
    tensors = {f"{kind}{turn}": normal(CHANNELS, *grid) for kind in kinds for turn in turns}
    return tensors | {
        "tokens": normal(captions, LENGTH, WIDTH),
        "mask": torch.rand(captions, LENGTH, generator=draw).round().to(torch.uint8),
        "pooled": normal(captions, POOLED),
    }


def write_synthetic_cache(
    folder: Path,
    *,
    counts: tuple[int, ...] = (7, 5),
    captions: int = 3,
    weights: list[float] | None = None,
    dtype: str = "float32",
    posterior: str = "moments",
    flips: bool = False,
    buckets: list[list[int]] | None = None,
    replaced: dict[int, dict[str, bytes]] | None = None,
) -> list[dict]:
    """Writes a cache of shards of so many samples, and returns the tensors of each.

    replaced: members of some samples, in place of the sound ones.
    """
    folder.mkdir()
    how = {"dtype": dtype, "posterior": posterior, "flips": flips}
    sizes = buckets or [[16, 16]]
    made = []
    for shard, count in enumerate(counts):
        members = []
        for number in range(len(made), len(made) + count):
            width, height = sizes[number % len(sizes)]
            tensors = make_tensors(number, captions, (height // FACTOR, width // FACTOR), **how)
            record = pack_record(
                {"note": number},
                captions=[f"caption {k} of {number}" for k in range(captions)],
                weights=weights,
                digest=f"{number:064x}",
                sizes=(height, width, 0, 0, height, width),
            )
            packed = pack_sample(tensors, record) | (replaced or {}).get(number, {})
            members.append((f"{number:04}", packed))
            made.append(tensors)
        write_shard(folder / f"{shard:05}.tar", members)
    null = {name: torch.zeros(1, *made[0][name].shape[1:]) for name in ("tokens", "mask", "pooled")}
    null = {name: part.to(made[0][name].dtype) for name, part in null.items()}
    (folder / NULL_NAME).write_bytes(save(null))
    manifest = Manifest(
        state="complete",
        autoencoder="a" * 64,
        text_encoder="b" * 64,
        pixels="square-1",
        source="c" * 16,
        posterior=posterior,
        dtype=dtype,
        captions="all",
        flips=flips,
        size=16,
        buckets=buckets,
        latent_channels=CHANNELS,
        factor=FACTOR,
        latent_shift=[0.0] * CHANNELS,
        latent_scale=[1.0] * CHANNELS,
        text_parts=["tokens", "mask", "pooled"],
        text_width=WIDTH,
        pooled_width=POOLED,
        max_length=LENGTH,
        samples=len(made),
    )
    write_manifest(folder, manifest)
    return made


def open_cached_set(folder: Path, *, train: bool = True, on_error: str = "stop", **how):
    shards = ShardReader(folder, ReadOptions(on_error=on_error))
    how = {"seed": 0, "manifest": read_manifest(folder), "on_error": on_error, **how}
    return CachedDataset(shards, train=train, **how)


def repack(tensors: dict, **changes) -> bytes:
    """Returns the file of a sample with other tensors; None leaves one out."""
    changed = {name: part for name, part in (tensors | changes).items() if part is not None}
    return pack_sample(changed, {})["safetensors"]


def rewrite_header(file: bytes, edit) -> bytes:
    """Returns a safetensors file whose header was edited, with the same data."""
    length = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    return np.uint64(len(text)).tobytes() + text + file[8 + length :]
