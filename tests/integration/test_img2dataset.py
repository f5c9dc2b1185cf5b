"""Shards of img2dataset, as its program writes them, in a run."""

import shutil

import numpy as np
import pytest
from img2dataset_shards import PICTURES, PROGRAM, STORED, make_shards, paint
from shell import TRAIN, run

from ldm.data.dataset import TextImageDataset
from ldm.data.shards.index import ReadOptions, open_index
from ldm.data.shards.reader import ShardReader

CAPTIONS = {
    "/wide.jpg": "a wide picture, é",
    "/tall.png": "a tall picture",
    "/small.webp": "",
    "/one.jpg": "7",  # a number in the json of some tables, and a text in its .txt
    "/last.jpg": "the last",
}


@pytest.fixture(scope="module", params=["stored", "made"])
def shards(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "stored":
        return shutil.copytree(STORED, folder / "web")
    if PROGRAM is None:
        pytest.skip("img2dataset is not on the path")
    return make_shards(folder)


def test_what_was_downloaded_is_read_in_order(shards, caplog):
    index = open_index(shards, ReadOptions(cache=shards))
    assert [index.key(i) for i in range(len(index))] == [*(f"00000{i}" for i in range(4)), "000020"]
    assert index.shard_sizes() == [4, 0, 1]
    assert not index.skipped
    assert "1 of 5 samples have an empty caption" in caplog.text
    assert "data.caption_key=alt" in caplog.text  # and no other of its notes
    assert "url" not in caplog.text


def test_images_and_captions_are_those_of_the_addresses(shards):
    data = TextImageDataset(ShardReader(shards), size=32, seed=0, train=False)
    for i, (name, (size, _)) in enumerate(PICTURES.items()):
        item = data[i, i]
        assert item["captions"] == CAPTIONS[name]
        middle = item["images"][:, 16, 16].numpy()
        whole = np.asarray(paint(size))
        expected = whole[size[1] // 2, size[0] // 2]
        assert np.abs(middle.astype(int) - expected).max() < 12


def test_a_column_that_was_kept_is_a_caption(shards):
    index = open_index(shards, ReadOptions(cache=shards, caption_key="alt"))
    assert index.captions.count_empty("alt") == 0
    data = TextImageDataset(
        ShardReader(shards, ReadOptions(caption_key="alt")), size=32, seed=0, train=False
    )
    assert data[2, 2]["captions"] == "alt of /small.webp"


def test_a_run_trains_on_them(tmp_path):
    shutil.copytree(STORED, tmp_path / "data/web")
    small = ["model=nano", "text_encoder=none", "autoencoder=identity", "trainer.max_steps=2"]
    small += ["data.size=16", "data.batch_size=4", "data.workers=0", "eval=none", "samples.n=0"]
    words = [
        "data=shards",
        "data.train='data/web/{00000..00001}.tar'",
        "data.val=data/web/00002.tar",
    ]
    printed = run(TRAIN, *words, *small, "trainer=cpu", "logger=csv", "name=web", cwd=tmp_path)
    assert "finished at step 2" in printed
