"""ldm cache by the command line: kills, several processes, damage, refusals."""

import json
import shutil
import signal
import tarfile
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from material import picture
from safetensors.torch import load
from shell import run, start
from world import SIZE, write_shapes

from ldm.cli.cache import CACHE_TEXT_OPTIONS, cache_data_set
from ldm.config.command_line import convert_to_usage_errors, split_text_options
from ldm.config.search_path import CONF_DIR
from ldm.data.cached.manifest import CacheError, read_manifest
from ldm.data.shards.reader import ShardReader, write_shard
from ldm.utils.errors import UsageError
from ldm.utils.hashing import hash_bytes

COMMAND = ["-m", "ldm.cache", "workers=0", "device=cpu", "batch=16"]
SHARDS = 24


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with shards of shapes, and the cache that an undisturbed command makes of them."""
    home = tmp_path_factory.mktemp("home")
    write_shapes(home / "shards", *[range(10)] * SHARDS)
    said = run(*COMMAND, "data=shards", "out=whole", cwd=home)
    assert f"{10 * SHARDS} images with 1 captions each: about" in said
    assert f"{10 * SHARDS} samples in whole" in said
    return home


@pytest.fixture
def call(home, monkeypatch):
    """Makes a cache by a function call, in place of a process, with words of the command line."""
    monkeypatch.chdir(home)

    def call(*words: str) -> None:
        typed, words = split_text_options([*COMMAND[2:], *words], CACHE_TEXT_OPTIONS)
        with initialize_config_dir(CONF_DIR, version_base="1.3"):
            cfg = compose("cache", overrides=words)
        texts = {name: None if name == "out" else cfg[name] for name in CACHE_TEXT_OPTIONS}
        with convert_to_usage_errors():
            cache_data_set(cfg, texts | typed, words=words)

    return call


def read_folder(folder: Path) -> dict[str, bytes]:
    assert not [path for path in folder.rglob("*") if path.is_dir()]
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".npz"}


def test_a_cache_has_the_shards_keys_and_order_of_its_source(home):
    manifest = read_manifest(home / "whole")
    assert manifest.samples == 10 * SHARDS
    assert manifest.size == SIZE
    source, cache = (ShardReader(home / name).index for name in ("shards", "whole"))
    assert [path.name for path in cache.paths] == [path.name for path in source.paths]
    assert cache.shard_sizes() == source.shard_sizes()
    assert [cache.key(i) for i in range(len(cache))] == [source.key(i) for i in range(len(source))]


@pytest.mark.slow
def test_a_kill_and_two_processes_at_once_leave_the_same_bytes(home):
    command = [*COMMAND, "data=shards", "out=killed"]
    process = start(*command, cwd=home)
    deadline = time.monotonic() + 120
    while not list((home / "killed").glob("*_stats.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(list((home / "killed").glob("*_stats.json"))) < SHARDS
    with pytest.raises(CacheError, match="half-made"):
        read_manifest(home / "killed")
    (home / "killed" / "00001.tar").write_bytes(b"half a shard")
    both = [start(*command, cwd=home) for _ in range(2)]
    assert [process.wait(300) for process in both] == [0, 0]
    assert read_folder(home / "killed") == read_folder(home / "whole")


def test_the_same_command_mends_a_shard_that_verify_names(home, call, capsys):
    shutil.copytree(home / "whole", home / "spoiled")
    shard = home / "spoiled" / "00003.tar"
    data = bytearray(shard.read_bytes())
    data[3000] ^= 1
    shard.write_bytes(data)
    said = run("-m", "ldm.cache", "out=spoiled", "verify=true", cwd=home, expect=2)
    assert "00003.tar is not what was written (its digest differs)" in said
    call("data=shards", "out=spoiled", "verify=true")
    assert "is sound: 240 samples; 60 of them" in capsys.readouterr().out
    assert read_folder(home / "spoiled") == read_folder(home / "whole")


def test_a_sample_that_verify_would_encode_otherwise_is_named(home, call):
    """The source has another image under the same key since."""
    write_shapes(home / "others", range(10))
    words = ["data=others", "out=stale", "size=16"]
    call(*words)
    samples = [ShardReader(home / "others").read(n) for n in range(10)]
    images = [sample.image for sample in samples]
    shortest, longest = min(images, key=len), images.index(max(images, key=len))
    images[longest] = shortest.ljust(len(images[longest]), b"\0")  # of the same length
    texts = [sample.captions[0].encode() for sample in samples]
    members = [{"png": image, "txt": text} for image, text in zip(images, texts, strict=True)]
    keys = [sample.key for sample in samples]
    write_shard(home / "others" / "00000.tar", zip(keys, members, strict=True))
    with pytest.raises(UsageError, match=f"sample '{keys[longest]}' is encoded otherwise now"):
        call(*words, "verify=true")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["out=whole", "dtype=bf16", "data=shards"], "dtype was 'float16', is 'bf16'): give those"),
        (["out=whole", "text_encoder=none", "data=shards"], "whole is a cache with other settings"),
        (["out=shards", "data=shards"], "out=shards is the source itself"),
        (["out=new", "data=shards", "size=20"], "give size=16 or 24"),
        (["out=new", "data=shards", "autoencoder=identity"], "give posterior=mean"),
        (["out=new", "data=shards", "captions=2"], "give max_captions=N"),
        (["out=new", "data=shards", "pixels=256"], "add buckets=auto"),
        (["out=new", "data=scenes"], "an option of train.py"),
        (["out=new", "verify=true"], "new has no cache.json, so it is no cache"),
        (["out=new"], "data is needed"),
        (["data=shards"], "out is needed"),
    ],
)
def test_a_mistake_is_refused_with_the_remedy(home, call, words, said):
    with pytest.raises(UsageError) as error:
        call(*words)
    assert said in str(error.value)
    assert not (home / "new").exists()


def test_a_damaged_image_stops_the_command_or_is_left_out(home, call, capsys):
    images = [(f"{n}", {"png": b"no image", "txt": b"a text"}) for n in range(2)]
    good = ShardReader(home / "shards").read(0).image
    images.insert(1, ("good", {"png": good, "txt": b"a text"}))
    (home / "damaged").mkdir()
    write_shard(home / "damaged" / "00000.tar", images)
    with pytest.raises(UsageError, match=r"00000\.tar: sample '0'.*on_error=skip"):
        call("data=damaged", "out=partly", "size=16")
    call("data=damaged", "out=partly-2", "size=16", "on_error=skip")
    said = capsys.readouterr().out
    assert "1 samples in partly-2" in said
    assert "left out: " in said
    manifest = read_manifest(home / "partly-2")
    assert manifest.samples == 1
    assert sum(manifest.skipped.values()) == 2
    stats = json.loads((home / "partly-2" / "00000_stats.json").read_text())
    assert len(stats["damaged"]) == 2


def test_images_go_to_buckets_with_their_flips_and_first_captions(home, call, capsys):
    sizes = [(48, 32), (32, 48), (40, 40), (96, 32)]
    captions = json.dumps({"captions": ["one", "two", "three"], "clip": 0.5}).encode()
    images = [(f"{n}", {"png": picture(n, size), "json": captions}) for n, size in enumerate(sizes)]
    (home / "mixed").mkdir()
    write_shard(home / "mixed" / "00000.tar", images)
    words = ["buckets=[[48,32],[32,48]]", "flips=true", "max_captions=2", "dtype=float32"]
    call("data=mixed", "out=boxes", *words, "verify=true")
    said = capsys.readouterr().out
    assert "buckets: 48x32 " in said
    assert "boxes is sound: 4 samples; 4 of them" in said
    manifest = read_manifest(home / "boxes")
    assert manifest.buckets == [[48, 32], [32, 48]]
    assert manifest.captions == 2
    with tarfile.open(home / "boxes" / "00000.tar") as tar:
        members = {name: tar.extractfile(name).read() for name in tar.getnames()}
    assert list(members) == [
        f"{n}.{suffix}" for n in range(4) for suffix in ("json", "safetensors")
    ]
    shapes = [tuple(load(members[f"{n}.safetensors"])["mean"].shape[1:]) for n in range(4)]
    assert shapes == [(4, 6), (6, 4), (4, 6), (4, 6)]
    record, tensors = json.loads(members["1.json"]), load(members["1.safetensors"])
    assert record["clip"] == 0.5
    assert record["captions"] == ["one", "two"]
    assert record["image_size"] == [32, 48]
    assert record["digest"] == hash_bytes(images[1][1]["png"])
    assert len(tensors["tokens"]) == 2
    assert not torch.equal(tensors["mean_flipped"], tensors["mean"].flip(-1))


def test_shards_that_were_not_in_the_order_of_their_names_are_told(home, call, capsys):
    write_shapes(home / "two", range(2), range(3))
    call("data=[two/00000.tar,two/00001.tar]", "out=straight")
    assert "differs from that of the images" not in capsys.readouterr().out
    call("data=[two/00001.tar,two/00000.tar]", "out=turned")
    assert "the order of a training differs from that of the images" in capsys.readouterr().out
