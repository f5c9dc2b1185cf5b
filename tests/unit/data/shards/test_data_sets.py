"""Several data sets in one run, each with a weight and a size."""

import pickle

import numpy as np
import pytest
from material import samples, tar_bytes
from omegaconf import OmegaConf

from ldm.config.registry import validate_component
from ldm.config.training_checks import check_data_exist
from ldm.data.shards.data_sets import WeightedDataSet, list_data_sets, list_locations
from ldm.data.shards.index import ReadOptions
from ldm.data.shards.reader import ShardReader


@pytest.fixture
def folders(tmp_path):
    first = 0
    for name, *counts in (("a", 2, 3), ("b", 4)):
        (tmp_path / name).mkdir()
        for n, count in enumerate(counts):
            (tmp_path / name / f"{n}.tar").write_bytes(tar_bytes(samples(count, first)))
            first += count
    return str(tmp_path / "a"), str(tmp_path / "b")


def test_plain_locations_are_no_data_sets():
    for source in ("a", ["a", "b", "b"], []):
        assert list_data_sets(source) == []
    assert list_locations("a") == ["a"]
    assert list_locations(["a", "b", "b"]) == ["a", "b", "b"]


def test_data_sets_have_weights_and_sizes():
    source = [{"path": ["a", "b"], "weight": 0.5}, "c", {"path": "d", "size": 64}]
    expected = [
        WeightedDataSet(["a", "b"], 0.5),
        WeightedDataSet("c", 1.0),
        WeightedDataSet("d", 1.0, 64),
    ]
    assert list_data_sets(source) == expected
    assert list_data_sets(OmegaConf.create(source)) == expected
    assert list_data_sets({"path": "a", "weight": 2}) == [WeightedDataSet("a", 2)]
    assert list_locations(source) == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"weight": 1}, "a mapping of path, weight and size"),
        ({"path": "a", "wieght": 1}, "a mapping of path, weight and size"),
        ({"path": [["a"]]}, "a mapping of path, weight and size"),
        ({"path": "a", "weight": 0}, "a: the weight is a number above 0, got 0"),
        ({"path": "a", "weight": True}, "got True"),
        ({"path": "a", "weight": 1e9}, "a: the weight is 0.0001 to 10000, got 1000000000.0"),
        ({"path": "a", "weight": 1e-9}, "a: the weight is 0.0001 to 10000, got 1e-09"),
        ({"path": "a", "weight": float("nan")}, "got nan"),
        ({"path": "a", "size": "64"}, "a: the size is a side in pixels, got '64'"),
        ({"path": "a", "size": 0}, "got 0"),
    ],
)
def test_what_is_no_data_set_is_refused(entry, told):
    with pytest.raises(ValueError, match=told):
        list_data_sets(["b", entry])


def test_their_samples_are_joined_one_data_set_after_another(folders):
    a, b = folders
    joined = ShardReader([{"path": a}, {"path": b, "weight": 2}], ReadOptions(measure=True))
    plain = ShardReader([a, b], ReadOptions(measure=True))
    assert joined.index.data_sets == [2, 1]
    assert joined.index.shard_sizes() == plain.index.shard_sizes() == [2, 3, 4]
    assert joined.index.fingerprint == plain.index.fingerprint
    np.testing.assert_array_equal(joined.index.sizes, plain.index.sizes)
    assert joined.index.captions == plain.index.captions
    reader = pickle.loads(pickle.dumps(joined))
    assert [reader.read(i) for i in range(9)] == [plain.read(i) for i in range(9)]


def test_a_missing_data_set_is_named_before_anything_is_imported(folders, tmp_path):
    check_data_exist([{"path": folders[0]}, {"path": "hf://datasets/a/b"}])
    with pytest.raises(FileNotFoundError, match="absent"):
        check_data_exist([{"path": folders[0]}, {"path": [str(tmp_path / "absent")]}])


def test_a_checkpoint_may_name_data_sets():
    node = {"_target_": "ldm.data.datamodule.TextImageData", "train": [{"path": "a", "weight": 2}]}
    assert validate_component(node, "data") == node
    for entry in (
        {"path": "${oc.env:HOME}"},
        {"path": "a", "_target_": "os.system"},
        {"path": {"_target_": "os.system"}},
        {"path": "a", "weight": {"_target_": "os.system"}},
    ):
        with pytest.raises(ValueError, match=r"data\.train"):
            validate_component({**node, "train": [entry]}, "data")
