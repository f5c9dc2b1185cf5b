"""Latents and text states of a cache: those of the encoders, whatever the batch."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load
from torch import nn
from world import write_shapes

from ldm.data.cached.manifest import TEXT_PARTS, CacheError, Manifest
from ldm.data.cached.source import CacheSource
from ldm.data.cached.writer import plan_cache_shards
from ldm.data.dataset import TextImageDataset
from ldm.data.shards.reader import ShardReader
from ldm.inference.encoding import MIN_BATCH, CacheEncoder, CacheSamples, CaptionStates
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.text.labels import NullTextEncoder

NUMBERS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]


@pytest.fixture
def source(tmp_path) -> CacheSource:
    folder = write_shapes(tmp_path / "shards", NUMBERS, NUMBERS, NUMBERS[:3])
    images = TextImageDataset(
        ShardReader(folder), size=16, seed=0, train=False, fast_pixels=True, gives_sizes=True
    )
    return CacheSource(images)


@pytest.fixture
def autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(channels=8, multipliers=[1, 2], blocks=1, groups=4, attention=True).eval()


def list_parts(text_encoder) -> list[str]:
    null = text_encoder.null(1)
    return [name for name in TEXT_PARTS if getattr(null, name) is not None]


def make_encoder(encode, text_encoder, **settings) -> CacheEncoder:
    batch = settings.pop("batch", 32)
    manifest = Manifest(
        **dict.fromkeys(("autoencoder", "text_encoder", "pixels", "source"), "x"),
        posterior="moments",
        dtype="float32",
        captions="all",
        flips=False,
        size=16,
        latent_channels=4,
        factor=2,
        latent_shift=[0.0] * 4,
        latent_scale=[1.0] * 4,
        text_parts=list_parts(text_encoder),
        text_width=text_encoder.width or None,
        pooled_width=text_encoder.pooled_width or None,
        max_length=text_encoder.max_length or None,
    )
    manifest = replace(manifest, **settings)
    return CacheEncoder(encode, text_encoder, manifest, torch.device("cpu"), batch)


def write(source: CacheSource, encoder: CacheEncoder, number: int) -> dict[str, dict]:
    samples = CacheSamples(source, encoder, workers=0)
    shard = plan_cache_shards(
        source.images.shards.index.paths[0].parent, source.images.shards.index
    )
    found = samples(shard[number], [])
    return {key: load(members["safetensors"]) for key, members in found}


def test_the_tensors_are_those_of_the_encoders(source, autoencoder, tiny_text):
    encoder = make_encoder(autoencoder.posterior, tiny_text, flips=True)
    found = write(source, encoder, 0)
    assert list(found) == [f"{n:04}" for n in NUMBERS]
    batch = source.images.read_batch([(i, i) for i in range(10)])
    images = batch["images"].float() / 127.5 - 1
    images = torch.cat([images, images])  # more than MIN_BATCH
    with torch.no_grad():
        mean, logvar = autoencoder.posterior(images)
        flipped, _ = autoencoder.posterior(images.flip(-1))
        text = tiny_text([*batch["captions"], *batch["captions"]])
    wanted = {"mean": mean, "logvar": logvar, "mean_flipped": flipped, "tokens": text.tokens}
    for n, tensors in enumerate(found.values()):
        for name, part in wanted.items():
            row = part[n][None] if name == "tokens" else part[n]
            assert torch.equal(tensors[name], row), name


def test_batches_below_the_limit_are_filled_up(source, autoencoder, tiny_text):
    """A shard of three has the bits that the same images have in a shard of ten."""
    encoder = make_encoder(autoencoder.posterior, tiny_text)
    ten, three = write(source, encoder, 1), write(source, encoder, 2)
    assert len(three) == 3 < MIN_BATCH
    for key, tensors in three.items():
        assert all(torch.equal(tensors[name], ten[key][name]) for name in tensors)


def test_a_caption_is_encoded_once(tiny_text, autoencoder):
    calls = []

    class Counting(nn.Module):
        width, pooled_width, max_length = 1, 1, 1

        null = tiny_text.null

        def forward(self, captions):
            calls.append(list(captions))
            return tiny_text(captions)

    states = CaptionStates(make_encoder(autoencoder.posterior, Counting(), batch=2))
    states.add(["a", "b", "a", "c"])
    states.add(["c", "a"])
    assert calls == [["a", "b"], ["c", ""]]
    assert len(states.stack(["c", "a"])["tokens"]) == 2


def test_an_unconditional_cache_has_latents_alone(source, autoencoder):
    encoder = make_encoder(autoencoder.posterior, NullTextEncoder(), posterior="mean")
    assert all(tensors.keys() == {"mean"} for tensors in write(source, encoder, 2).values())
    assert encoder.encode_null() == {}


def test_latents_that_are_not_finite_are_named(source, autoencoder):
    def spoiled(images):
        mean, logvar = autoencoder.posterior(images)
        mean[1, 0, 0, 0] = 1e6
        return mean, logvar

    encoder = make_encoder(spoiled, NullTextEncoder(), dtype="float16")
    with pytest.raises(CacheError, match=r"00000\.tar: sample '0001' has NaN or infinity in mean"):
        write(source, encoder, 0)


def test_two_shards_of_one_name_are_refused(tmp_path):
    folders = [write_shapes(tmp_path / name, NUMBERS) for name in ("a", "b")]
    with pytest.raises(CacheError, match=r"two shards of the source are called 00000\.tar"):
        plan_cache_shards(tmp_path, ShardReader(folders).index)
