"""Samples and manifests of a cache: what goes in comes out, and damage is refused by name."""

import json
import pickle
import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save

from ldm.data.cached.format import (
    DTYPE_BY_NAME,
    check_finite,
    pack_sample,
    pack_tensors,
    read_layout,
    unpack_null,
    unpack_sample,
)
from ldm.data.cached.manifest import CacheError, Manifest, read_manifest, write_manifest

MANIFEST = Manifest(
    autoencoder="a" * 64,
    text_encoder="b" * 64,
    pixels="square-1",
    source="c" * 16,
    posterior="moments",
    dtype="float32",
    captions="all",
    flips=False,
    size=16,
    latent_channels=4,
    factor=8,
    latent_shift=[0.0] * 4,
    latent_scale=[1.0] * 4,
    text_parts=["tokens", "mask", "pooled"],
    text_width=6,
    pooled_width=5,
    max_length=3,
)


def make_tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"mean": (4, 2, 2), "logvar": (4, 2, 2), "tokens": (2, 3, 6), "pooled": (2, 5)}
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }
    return tensors | {"mask": torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=torch.uint8)}


@pytest.mark.parametrize("name", DTYPE_BY_NAME)
def test_a_sample_is_read_as_it_was_written(name):
    tensors = make_tensors(DTYPE_BY_NAME[name])
    members = pack_sample(tensors, {"captions": ["one", "two"]})
    read = unpack_sample(bytearray(members["safetensors"]), replace(MANIFEST, dtype=name))
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[key], tensors[key]) for key in tensors)
    assert json.loads(members["json"]) == {"captions": ["one", "two"]}


@pytest.mark.parametrize("name", DTYPE_BY_NAME)
def test_the_bytes_are_those_of_safetensors(name):
    tensors = make_tensors(DTYPE_BY_NAME[name])
    data = pack_tensors(tensors)
    assert data == save(tensors)
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in load(data).items())


def with_header(header: object, raw: bytes = bytes(64)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + raw


def part(start: int, end: int, shape=(4, 2, 2), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HOSTILE = {
    "nothing": b"",
    "a pickle": pickle.dumps({"mean": [1.0] * 16}),
    "an image": b"\xff\xd8\xff\xe0" + bytes(100),
    "a header of exabytes": struct.pack("<Q", 2**60) + b"{}",
    "a header that is longer than the file": struct.pack("<Q", 8000) + b"{}",
    "no JSON": with_header(b"{'mean': 1}"),
    "JSON that is no mapping": with_header([1, 2]),
    "JSON that is nested deep": with_header(b"[" * 9000),
    "no tensors": with_header({}),
    "an unknown name": with_header({"code": part(0, 64)}),
    "an unknown type": with_header({"mean": part(0, 64, dtype="I64")}),
    "a negative side": with_header({"mean": part(0, 64, shape=(-4, -2, 2))}),
    "a side that is no number": with_header({"mean": part(0, 64, shape=("4", 2, 2))}),
    "a shape of other bytes": with_header({"mean": part(0, 64, shape=(4, 2, 3))}),
    "a shape beyond all memory": with_header({"mean": part(0, 64, shape=(2**40, 2**20, 1))}),
    "offsets that overlap": with_header({"mean": part(0, 64), "logvar": part(32, 96)}, bytes(96)),
    "offsets with a gap": with_header({"mean": part(8, 72)}, bytes(72)),
    "offsets that go back": with_header({"mean": part(64, 0)}),
    "bytes at the end": pack_tensors(make_tensors()) + b"\0",
    "a cut end": pack_tensors(make_tensors())[:-1],
    "a missing tensor": pack_tensors({"mean": torch.zeros(4, 2, 2)}),
    "another type": pack_tensors(make_tensors(torch.float16)),
    "another size": pack_tensors(make_tensors() | {"mean": torch.zeros(4, 2, 3)}),
    "other channels": pack_tensors(make_tensors() | {"mean": torch.zeros(3, 2, 2)}),
    "text of another length": pack_tensors(make_tensors() | {"tokens": torch.zeros(2, 4, 6)}),
    "text of other captions": pack_tensors(make_tensors() | {"tokens": torch.zeros(3, 3, 6)}),
    "a mask of floats": pack_tensors(make_tensors() | {"mask": torch.zeros(2, 3)}),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_any_other_file_is_refused(kind):
    with pytest.raises(CacheError):
        unpack_sample(bytearray(HOSTILE[kind]), MANIFEST)


def test_the_header_is_parsed_once_for_all_samples_of_a_size():
    one, other = pack_tensors(make_tensors()), pack_tensors(make_tensors())
    assert read_layout(one) is read_layout(memoryview(other))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(value):
    tensors = make_tensors()
    tensors["logvar"][0, 0, 0] = value
    with pytest.raises(CacheError, match="in logvar"):
        check_finite(tensors)


def test_the_null_condition_has_the_parts_of_the_manifest():
    null = {name: make_tensors()[name][:1] for name in MANIFEST.text_parts}
    assert unpack_null(pack_tensors(null), MANIFEST).keys() == null.keys()
    with pytest.raises(CacheError):
        unpack_null(pack_tensors({"tokens": null["tokens"]}), MANIFEST)
    assert unpack_null(b"", replace(MANIFEST, text_parts=[])) == {}
    with pytest.raises(CacheError, match=r"has tokens as torch\.float32"):
        unpack_null(pack_tensors(null | {"tokens": torch.zeros(1, 4, 6)}), MANIFEST)


def test_tensors_of_another_cache_are_refused():
    """Another autoencoder gives latents of the same shape, which nothing else tells apart."""
    other = replace(MANIFEST, autoencoder="d" * 64)
    members = pack_sample(make_tensors(), {}, stamp=MANIFEST.stamp)
    assert load(members["safetensors"]).keys() == make_tensors().keys()
    for same in (MANIFEST, replace(MANIFEST, source="e" * 16, samples=3, keys="f" * 16)):
        unpack_sample(bytearray(members["safetensors"]), same)
    with pytest.raises(CacheError, match="is of another cache"):
        unpack_sample(bytearray(members["safetensors"]), other)
    null = {name: make_tensors()[name][:1] for name in MANIFEST.text_parts}
    with pytest.raises(CacheError, match="is of another cache"):
        unpack_null(pack_tensors(null, stamp=MANIFEST.stamp), other)


@pytest.mark.parametrize(
    "wrong",
    [
        {"buckets": []},
        {"text_width": None},
        {"pooled_width": 0},
        {"text_parts": ["mask", "mask"]},
        {"latent_channels": 0, "latent_shift": [], "latent_scale": []},
    ],
)
def test_a_manifest_of_impossible_sizes_is_refused(tmp_path, wrong):
    write_manifest(tmp_path, replace(MANIFEST, state="complete", **wrong))
    with pytest.raises(CacheError, match="it is damaged, make the cache again"):
        read_manifest(tmp_path)


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    manifest = replace(MANIFEST, state="complete", samples=3, shards={"00000": "d" * 64})
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest


def test_a_half_made_cache_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(CacheError, match=r"no cache\.json"):
        read_manifest(tmp_path)
    write_manifest(tmp_path, MANIFEST)
    with pytest.raises(CacheError, match="half-made cache: give the `ldm cache"):
        read_manifest(tmp_path)
    assert read_manifest(tmp_path, complete=False) == MANIFEST


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("format", 2, "format 2, this ldm reads 1"),
        ("size", 20, "no multiple of factor=8"),
        ("size", None, "size is None"),
        ("buckets", [[16, 16], [8]], "no multiple"),
        ("dtype", "int8", "none of bf16"),
        ("latent_scale", [0.0] * 4, "not positive"),
        ("latent_shift", [0.0] * 3, "not 4 numbers"),
        ("latent_shift", [float("nan")] * 4, "not 4 numbers"),
        ("text_parts", ["code"], "impossible"),
        ("flips", 1, "flips is 1"),
        ("captions", "some", "captions is 'some'"),
        ("latent_channels", True, "latent_channels is True"),
        ("more", 1, "no key of it"),
        ("samples", -1, "samples is -1"),
    ],
)
def test_a_damaged_manifest_is_refused_by_name(tmp_path, key, value, said):
    write_manifest(tmp_path, replace(MANIFEST, state="complete"))
    path = tmp_path / "cache.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(CacheError, match=said):
        read_manifest(tmp_path)


def test_a_manifest_that_is_no_json_is_refused(tmp_path):
    for text in ("", "{", "[]", "[" * 100_000):
        (tmp_path / "cache.json").write_text(text)
        with pytest.raises(CacheError):
            read_manifest(tmp_path)


def test_differences_of_settings_are_named():
    other = replace(MANIFEST, dtype="bf16", state="complete", samples=4)
    assert MANIFEST.list_differences(other) == ["dtype was 'float32', is 'bf16'"]
