"""train.py plan=true: a table, and nothing else."""

import json

import pytest
from shell import TRAIN, run

BASE = ["name=big", "autoencoder=sd", "text_encoder=clip_l14", "model=base", "data=shards"]
BASE += ["data.train=nowhere", "data.val=nowhere", "data.size=512", "trainer=gpu"]


def test_a_model_of_stable_diffusions_size_is_counted_and_nothing_is_written(tmp_path):
    text = run(TRAIN, *BASE, "plan=true", cwd=tmp_path)
    assert "denoiser" in text
    assert "859.52 M" in text
    assert "text encoder" in text
    assert "123.06 M" in text
    assert "not known: the shards are not here" in text
    assert "hours" in text
    assert "H100 of 989 TFLOP/s" in text
    assert not list(tmp_path.iterdir())


def test_programs_get_json(tmp_path):
    text = run(TRAIN, "plan=json", cwd=tmp_path)
    table = json.loads(text[text.index("{") :])
    assert table["run"]["images seen"] == 1600 * 32
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-m", "scheduler=cosine,linear"], "plan counts one run: leave -m out"),
        (["data.batch_size=7", "trainer.devices=2"], "must be a multiple of 2"),
        (["model.groups=7"], "must be divisible by num_groups"),
        (["plan=yes_please"], "plan=yes_please must be true, or false, or one of json"),
    ],
)
def test_a_plan_that_cannot_be_counted_trains_nothing(words, message, tmp_path):
    done = run(TRAIN, "plan=true", *words, cwd=tmp_path, expect=2)
    assert message in done
    assert not list(tmp_path.iterdir())
