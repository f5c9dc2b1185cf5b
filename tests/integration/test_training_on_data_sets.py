"""Runs over several data sets, each with a weight and a size of its own."""

import shutil
from collections import Counter

import pytest
import recorder
from shell import ROOT, TRAIN, run
from world_size_runs import BATCH, RUN, SIDES, write

SETS = "data.train=[{path:a,weight:0.5},{path:b,weight:2,size:24}]"


def train(home, *options: str, expect: int = 0) -> str:
    path = f"{ROOT}:{ROOT / 'tests' / 'helpers'}"
    options = ["trainer.devices=1", "data.workers=0", "data.val=a", "name=run", *options]
    return run(TRAIN, *RUN, *options, cwd=home, expect=expect, PYTHONPATH=path, OMP_NUM_THREADS="1")


@pytest.mark.slow
def test_a_run_over_weighted_data_sets_of_two_sizes(tmp_path):
    """Half of 48 and twice 12 an epoch: four batches, two of each size."""
    write(tmp_path / "a", 30, 18, sides=SIDES)
    write(tmp_path / "all", 48, 12, sides=SIDES)
    (tmp_path / "b").mkdir()
    shutil.move(tmp_path / "all" / "00001.tar", tmp_path / "b")
    told = train(tmp_path, SETS, "trainer.max_steps=4")
    assert "buckets: 16x16 80.0%, 24x24 20.0%" in told
    train(tmp_path, SETS, "trainer.max_steps=8")
    steps = {line["step"]: line["keys"] for line in recorder.read(tmp_path / "seen")}
    assert sorted(steps) == list(range(1, 9))
    sets = [{key >= "0048" for key in keys} for _, keys in sorted(steps.items())]
    assert all(len(found) == 1 for found in sets), "one size a step"
    for epoch in (sets[:4], sets[4:]):
        assert sorted(found == {True} for found in epoch) == [False, False, True, True]
    seen = Counter(key for keys in steps.values() for key in keys)
    assert seen == {f"{n:04}": 1 if n < 48 else 4 for n in range(60)}

    more = ["trainer.max_steps=9", "resume.allow=[data]"]
    refused = "runs/run was trained in another order of samples: give the"
    for other, remedy in (
        ([SETS.replace("0.5", "1")], "data.buckets, data.pixels, and weights and sizes"),
        ([SETS, f"data.batch_size={2 * BATCH}"], "data.batch_size=12 that it began with"),
        (["data.train=a"], "weights and sizes of data.train that it began with"),
    ):
        told = train(tmp_path, *more, *other, expect=2)
        assert refused in told
        assert remedy in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([SETS.replace("0.5", "0")], "data.train: a: the weight is a number above 0, got 0"),
        ([SETS.replace("24", "25")], "data.train: size=25 must be a multiple of"),
        ([SETS, "data.buckets=[[16,16]]"], "give data.buckets=auto in place of the list"),
        ([SETS.replace("train", "val"), "data.train=a"], "data.val: weights and sizes are for"),
    ],
)
def test_what_cannot_be_is_refused_at_once(tmp_path, options, told):
    write(tmp_path / "a", 3)
    write(tmp_path / "b", 3)
    assert told in train(tmp_path, *options, expect=2)
