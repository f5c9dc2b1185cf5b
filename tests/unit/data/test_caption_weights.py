"""Several captions with weights: data.captions='{short: 0.2, long: 0.8}'."""

import json
import logging
from collections import Counter

import pytest
from material import picture, tar_bytes

from ldm.data.captions import read_weighted_captions
from ldm.data.datamodule import TextImageData
from ldm.data.shards.index import ReadOptions, open_index
from ldm.data.shards.tar_headers import ShardError

WEIGHTS = {"short": 0.2, "long": 0.8}


@pytest.fixture
def folder(tmp_path):
    """Nine samples: all with a long text but the third, which has a short one, as the second."""
    members = []
    for n in range(9):
        texts = {"long": f"long {n}"} if n != 2 else {}
        texts |= {"short": f"short {n}"} if n in (1, 2) else {}
        texts |= {"caption": "from elsewhere"}
        members += [(f"{n}.png", picture(n)), (f"{n}.json", json.dumps(texts).encode())]
    (tmp_path / "0.tar").write_bytes(tar_bytes(members))
    return tmp_path


def data(folder, captions=WEIGHTS, **changed) -> TextImageData:
    how = {"size": 8, "batch_size": 2, "workers": 0, "seed": 3} | changed
    return TextImageData(train=str(folder), val=str(folder), captions=captions, **how)


def test_the_heaviest_key_comes_first_and_a_list_shares_its_weight():
    record = json.dumps({"short": "s", "long": ["one", " ", "two"], "other": "o"}).encode()
    assert read_weighted_captions(record, WEIGHTS) == (["one", "two", "s"], [0.4, 0.4, 0.2])
    assert read_weighted_captions(b'{"short": "s"}', WEIGHTS) == (["s"], [0.2])
    for equal in ({"short": 1, "long": 1}, {"long": 1, "short": 1}):  # a run may resume with both
        assert read_weighted_captions(record, equal)[0] == ["one", "two", "s"]
    assert read_weighted_captions(b'{"other": "o"}', WEIGHTS) == ([""], [1.0])
    assert read_weighted_captions(None, WEIGHTS) == ([""], [1.0])


def test_training_draws_keys_by_weight_and_validation_takes_the_heaviest(folder):
    loaded = data(folder)
    n = len(loaded.order)
    drawn = Counter(loaded.train_set[1, epoch * n]["captions"] for epoch in range(500))
    assert set(drawn) == {"long 1", "short 1"}
    assert 70 <= drawn["short 1"] <= 130
    assert {loaded.train_set[2, epoch * n]["captions"] for epoch in range(20)} == {"short 2"}
    assert loaded.val_captions(3) == ["long 0", "long 1", "short 2"]
    assert loaded.val_set[1, 1]["captions"] == "long 1"


def test_the_caption_is_a_function_of_seed_and_position(folder):
    def captions(seed: int) -> list[str]:
        loaded = data(folder, seed=seed)
        positions = [*range(1, 90), 0]
        drawn = {p: loaded.train_set[loaded.order.at(p)[1], p]["captions"] for p in positions}
        return [drawn[p] for p in range(90)]

    assert captions(3) == captions(3)
    assert captions(3) != captions(4)


def test_one_key_is_the_same_as_caption_key(folder):
    one, key = data(folder, {"long": 5}), data(folder, None, caption_key="long")
    assert one.train_set.shards.index.fingerprint == key.train_set.shards.index.fingerprint
    assert one.val_captions(9) == key.val_captions(9)
    assert one.train_set.shards.index.fingerprint != data(folder).train_set.shards.index.fingerprint


def test_the_share_of_samples_with_each_key_is_logged(folder, caplog):
    with caplog.at_level(logging.INFO):
        open_index(folder, ReadOptions(captions=WEIGHTS))
    assert "captions: short in 22.2%, long in 88.9% of the samples" in caplog.text
    assert "empty caption" not in caplog.text


def test_a_key_that_no_sample_has_is_refused_with_those_that_exist(folder):
    with pytest.raises(
        ShardError, match=r"no json has text under lnog, but: caption, long.* mean long"
    ):
        open_index(folder, ReadOptions(captions={"short": 1, "lnog": 1}))


@pytest.mark.parametrize("wrong", [{}, {"long": 0}, {"long": -1}, {"long": "x"}, {"a": True}, "a"])
def test_weights_are_positive_numbers(wrong):
    with pytest.raises(ValueError, match=r"captions has keys .* '\{short: 0\.2, long: 0\.8\}'"):
        ReadOptions(captions=wrong)
    with pytest.raises(ValueError, match="caption_key and captions exclude each other"):
        ReadOptions(captions=WEIGHTS, caption_key="long")
