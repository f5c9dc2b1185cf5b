"""Training from a cache of latents and text states: by the command line, against images."""

import json
import shutil
from pathlib import Path

import pytest
from material import picture
from same_training import assert_same
from shell import FROZEN, rows, run, tensors, train

from ldm.data.shards.reader import write_shard

IMAGES = ["data.crop=center", "data.flip=0", *FROZEN]
CACHED = ["data=cached", "data.train=cache", "data.val=cache", "data.size=null", *FROZEN]
SWITCH = "resume.allow=[data]"


def cache(home: Path, *words: str) -> None:
    size = ("batch=4", "workers=1", "dtype=float32")
    run("-m", "ldm.cache", "data=shards", *size, *FROZEN, *words, cwd=home)


@pytest.fixture(scope="module")
def home(prepared, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cached") / "home"
    shutil.copytree(prepared, folder)
    cache(folder, "out=cache")
    return folder


def assert_same_run(home: Path, one: str, other: str) -> None:
    a, b = (tensors(home / "runs" / name) for name in (one, other))
    assert_same(a["state_dict"], b["state_dict"])
    assert_same(a["optimizer_states"], b["optimizer_states"])
    assert a["ldm"]["frozen"] == b["ldm"]["frozen"]
    pictures = [sorted((home / "runs" / name / "samples").glob("*.png")) for name in (one, other)]
    assert [path.name for path in pictures[0]] == [path.name for path in pictures[1]]
    losses = ([row["val/loss"] for row in rows(home / "runs" / name)] for name in (one, other))
    assert next(losses) == next(losses)


def test_a_run_from_a_cache_equals_one_from_images(home):
    """Also a run that begins with the images and goes on with the cache."""
    steps = [f"trainer.max_steps={n}" for n in (2, 4)]
    every = "trainer.val_check_interval=2"
    train(*IMAGES, "name=images", steps[1], every, "data.workers=1", cwd=home)
    train(*CACHED, "name=cached", steps[1], every, "data.workers=1", cwd=home)
    assert_same_run(home, "images", "cached")
    train(*IMAGES, "name=both", steps[0], every, cwd=home)
    refused = train(*CACHED, "name=both", steps[1], every, cwd=home, expect=2)
    assert "data._target_ was" in refused
    train(*CACHED, "name=both", steps[1], every, SWITCH, cwd=home)
    assert_same_run(home, "images", "both")
    words = ("ckpt=runs/cached", "prompt=a red ball", "steps=2", "n=1")
    assert "a-red-ball" in run("-m", "ldm.sample", *words, cwd=home)


@pytest.mark.slow
def test_buckets_of_a_cache_equal_those_of_images(home):
    sizes = [(40, 20) if i % 3 else (20, 20) for i in range(12)]
    samples = [
        (f"{i:02}", {"png": picture(20 * i, size), "txt": b"a red ball"})
        for i, size in enumerate(sizes)
    ]
    (home / "aspects").mkdir()
    write_shard(home / "aspects" / "0.tar", samples)
    buckets = "buckets=[[16,16],[32,16]]"
    words = ("batch=4", "workers=1", "dtype=float32", buckets)
    run("-m", "ldm.cache", "data=aspects", "out=by-size", *words, *FROZEN, cwd=home)
    places = ["data.train=by-size", "data.val=by-size", "data.size=null", *FROZEN]
    how = ["trainer.max_steps=5", "model.size_embedding=4"]
    train("data=cached", *places, "name=cached-sizes", *how, cwd=home)
    places = ["data.train=aspects", "data.val=aspects", f"data.{buckets}", "data.size=16"]
    train(*IMAGES, *places, "name=image-sizes", *how, cwd=home)
    assert_same_run(home, "image-sizes", "cached-sizes")


@pytest.mark.slow
def test_means_equal_a_run_that_takes_the_mean(home):
    cache(home, "out=means", "posterior=mean")
    means = [word.replace("=cache", "=means") for word in CACHED[1:]]
    mean, few = "posterior=mean", "trainer.max_steps=2"
    refused = train("data=cached", *means, few, "name=means", cwd=home, expect=2)
    assert "has the means of the latents alone: add posterior=mean" in refused
    train(*IMAGES, mean, few, "name=mean-of-images", cwd=home)
    train("data=cached", *means, mean, few, "name=means", cwd=home)
    assert_same_run(home, "mean-of-images", "means")


def test_the_encoders_need_not_be_there(home):
    shutil.copytree(home, alone := home.parent / "alone")
    shutil.rmtree(alone / "runs" / "ae")
    shutil.rmtree(alone / "runs" / "clip")
    few = ["trainer.max_steps=2", "name=alone"]
    told = train(*CACHED, *few, cwd=alone, expect=2)
    assert "autoencoder.path=runs/ae: there is no such run or folder" in told
    train(*CACHED, *few, "samples.n=0", "eval=none", cwd=alone)
    manifest = json.loads((alone / "cache" / "cache.json").read_text())
    frozen = tensors(alone / "runs" / "alone")["ldm"]["frozen"]
    assert frozen == {name: manifest[name] for name in ("autoencoder", "text_encoder")}


def test_other_images_and_other_encoders_are_refused(home):
    few = ["trainer.max_steps=2", "samples.n=0", "name=first"]
    train(*CACHED, *few, cwd=home)
    shutil.copytree(home / "cache", home / "others")
    manifest = json.loads((home / "others" / "cache.json").read_text())
    (home / "others" / "cache.json").write_text(json.dumps(manifest | {"source": "0" * 16}))
    others = [word.replace("=cache", "=others") for word in CACHED[1:]]
    more = ["data=cached", *others, "trainer.max_steps=4", "name=first", "samples.n=0"]
    told = train(*more, SWITCH, cwd=home, expect=2)
    assert "runs/first was trained on other images than those of data.train" in told
    packaged = ["data=cached", "data.train=cache", "data.val=cache", "data.size=null"]
    told = train(*packaged, "name=second", "text_encoder=tiny", FROZEN[0], cwd=home, expect=2)
    assert "was made with another text_encoder than the settings name: add text_encoder=" in told
    assert not (home / "runs" / "second" / "checkpoints").exists()
