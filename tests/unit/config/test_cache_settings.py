"""Settings that do not fit a cache get one line with the remedy."""

import json
from dataclasses import replace

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from synthetic_caches import write_synthetic_cache as write_cache

from ldm.config.cache_settings import check_cache_settings
from ldm.config.cached_training import build_cached_components
from ldm.config.search_path import CONF_DIR
from ldm.data.cached.datamodule import cached_data
from ldm.data.cached.manifest import CacheError, open_cache, read_manifest, write_manifest
from ldm.data.shards.index import open_index
from ldm.utils.errors import UsageError

REFUSED = {
    "stage=autoencoder": "stage=autoencoder reads images, .* give data=shards",
    "stage=clip": "stage=clip reads images",
    "stage=classifier": "stage=classifier reads images",
    "style_encoder=clip": "style_encoder=.. reads images, .* leave it out",
    "data.size=64": "is of images of 16 pixels: leave data.size out",
}
TASKS = {
    "inpaint": "task=inpaint reads images, .* or task=text2img",
    "superres": "task=superres reads images",
    "video": "task=video reads images",
}


def settings(folder, *words, data="cached"):
    places = [f"data={data}", f"data.train={folder}", f"data.val={folder}", "name=x"]
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        return compose("train", overrides=[*places, *words])


@pytest.fixture
def folder(tmp_path):
    write_cache(tmp_path / "c")
    return tmp_path / "c"


@pytest.mark.parametrize("words", REFUSED)
def test_what_reads_images_is_refused(folder, words):
    with pytest.raises(UsageError, match=REFUSED[words]):
        check_cache_settings(settings(folder, *words.split()))


@pytest.mark.parametrize("task", TASKS)
def test_a_task_that_reads_images_is_refused(folder, task):
    cfg = settings(folder, f"task={task}")
    with pytest.raises(UsageError, match=TASKS[task]):
        build_cached_components(cfg, instantiate(cfg.task))


def test_sizes_that_the_network_cannot_take_are_refused(tmp_path):
    write_cache(tmp_path / "c", buckets=[[16, 16], [24, 16]])
    cfg = settings(tmp_path / "c", "model.multipliers=[1,2]")
    with pytest.raises(UsageError, match=r"images of 24 x 16 pixels, .* multiples of 16: make"):
        build_cached_components(cfg, instantiate(cfg.task))


def test_the_size_is_that_of_the_cache(folder):
    cfg = settings(folder)
    check_cache_settings(cfg)
    assert cfg.data.size == 16


def test_a_cache_is_not_taken_for_images(folder):
    with pytest.raises(UsageError, match="is a cache of latents, and no images: give data=cached"):
        check_cache_settings(settings(folder, data="shards"))
    both = f"data.train=[{{path:{folder}}},{folder}]"
    with pytest.raises(UsageError, match="is a cache of latents"):
        check_cache_settings(settings("elsewhere", both, data="shards"))


def test_images_are_not_taken_for_a_cache(tmp_path):
    with pytest.raises(CacheError, match=r"has no cache\.json, .* `ldm cache data=SHARDS"):
        check_cache_settings(settings(tmp_path))


def test_means_are_not_sampled_from(tmp_path):
    write_cache(tmp_path / "c", posterior="mean")
    with pytest.raises(UsageError, match=r"means of the latents alone: add posterior=mean"):
        check_cache_settings(settings(tmp_path / "c"))
    check_cache_settings(settings(tmp_path / "c", "posterior=mean"))


def test_caches_that_do_not_go_together_are_refused(folder, tmp_path):
    write_cache(tmp_path / "d", counts=(3,), buckets=[[32, 8]])
    both = open_cache([folder, tmp_path / "d"])
    assert both.samples == 15
    assert both.image_sizes == [(16, 16), (32, 8)]
    file = tmp_path / "d" / "cache.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"autoencoder": "f" * 64}))
    with pytest.raises(CacheError, match=r"does not go together with .* autoencoder was"):
        open_cache([folder, tmp_path / "d"])
    with pytest.raises(CacheError, match="are caches of another autoencoder"):
        cached_data(train=folder, val=tmp_path / "d", batch_size=4)


def write_keys(folder):
    """Completes the manifest of a cache as `ldm cache` does."""
    keys = open_index(folder).keys_digest
    write_manifest(folder, replace(read_manifest(folder), keys=keys))


def test_shards_that_changed_places_are_refused(folder):
    write_keys(folder)
    how = {"train": str(folder), "val": str(folder), "batch_size": 4}
    cached_data(**how)
    one, other = sorted(folder.glob("*.tar"))
    one.rename(folder / "third")
    other.rename(one)
    (folder / "third").rename(other)
    with pytest.raises(CacheError, match="are not those that were written, in their order"):
        cached_data(**how)


def test_a_null_condition_that_is_gone_or_damaged_is_named(folder):
    cfg = settings(folder)
    path = folder / "null.safetensors"
    for data in (b"x" * 100, None):
        path.unlink()
        if data:
            path.write_bytes(data)
        with pytest.raises(CacheError, match=r"null\.safetensors .*: make the cache again"):
            build_cached_components(cfg, instantiate(cfg.task))
