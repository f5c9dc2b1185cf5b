"""Scene accuracy inside a run and after it, on a run of a few steps."""

import csv
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from test_cli import run

from ldm.build.job import Job, build
from ldm.cli import CONF, UsageError
from ldm.evaluate import evaluate, scene_table
from ldm.metrics.scene_accuracy import NAMES, SUFFIXES
from ldm.pipeline import Pipeline

KEYS = [f"scene_{name}{suffix}" for suffix in SUFFIXES for name in NAMES]
TINY = [
    "trainer=cpu",
    "trainer.log_every_n_steps=1",
    "logger=csv",
    "data=scenes",
    "data.count=8",
    "data.val_count=4",
    "data.size=16",
    "data.batch_size=4",
    "data.workers=0",
    "model.channels=16",
    "model.groups=8",
    "model.multipliers=[1,2]",
    "model.attention=[false,true]",
    "autoencoder=identity",
    "samples.n=1",
    "samples.steps=1",
]


@dataclass
class Home:
    """A folder with a text encoder, and runs in it."""

    path: Path

    def options(self, *overrides: str) -> list[str]:
        places = [f"data.folder={self.path}/data", f"text_encoder.path={self.path}/clip"]
        return [*TINY, *places, *overrides]

    def train(self, name: str, *overrides: str) -> Job:
        with initialize_config_dir(CONF, version_base="1.3"):
            cfg = compose("train", overrides=self.options(f"name={name}", *overrides))
        job = build(cfg, self.path / "runs" / name)
        job.trainer.validate(job.module, datamodule=job.data, verbose=False)
        job.trainer.fit(job.module, datamodule=job.data)
        return job

    def rows(self, name: str) -> list[dict[str, str]]:
        with (self.path / "runs" / name / "metrics.csv").open() as file:
            return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def home(tiny_clip, tmp_path_factory) -> Home:
    path = tmp_path_factory.mktemp("home")
    tiny_clip.save(path / "clip")
    return Home(path)


@pytest.fixture(scope="module")
def measured(home) -> Job:
    """Three steps of two batches, each validated, every other one with pictures."""
    steps = ["trainer.max_steps=3", "trainer.val_check_interval=1"]
    few = ["eval.count=3", "eval.steps=2", "eval.batch=4", "eval.every=2"]
    return home.train("measured", *steps, "trainer.accumulate_grad_batches=2", *few)


def test_a_run_measures_every_so_often_and_at_its_end(home, measured):
    rows = home.rows("measured")
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    for row in rows:
        there = row["step"] != "1"
        for key in KEYS:
            assert bool(row[f"val/{key}"]) == there, (row["step"], key)
            assert not there or 0 <= float(row[f"val/{key}"]) <= 1
    assert "val/scene_accuracy" in measured.trainer.callback_metrics  # for result.json


def test_the_averaged_weights_are_measured_as_they_are_now(measured):
    checks = [c for c in measured.trainer.callbacks if type(c).__name__ == "SceneCheck"]
    assert checks[0].pipeline.denoiser is measured.module.ema.module
    assert isinstance(checks[0].pipeline, Pipeline)


def test_measuring_leaves_the_training_as_it_is(home, measured):
    steps = ["trainer.max_steps=3", "trainer.val_check_interval=1"]
    plain = home.train("plain", *steps, "trainer.accumulate_grad_batches=2", "eval=none")
    assert not any("scene" in key for key in home.rows("plain")[0])
    for name, tensor in measured.module.state_dict().items():
        assert torch.equal(tensor, plain.module.state_dict()[name]), name


def composed(*overrides: str):
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("evaluate", overrides=["count=3", "steps=2", "device=cpu", *overrides])


def asked(**given: str) -> dict[str, str | None]:
    return {"out": None, "autoencoder": None, "text_encoder": None} | given


def test_the_verb_leaves_numbers_and_says_them(home, measured):
    said = run("-m", "ldm.evaluate", "ckpt=runs/measured", "count=3", "steps=2", cwd=home.path)
    facts = json.loads((home.path / "runs/measured/metrics.json").read_text())
    assert list(facts["metrics"]) == KEYS
    assert facts["step"] == 3
    assert facts["ckpt"].endswith("step=00000003_end.ckpt")
    assert facts["settings"]["guidance"]["scale"] == 2
    assert {k: facts["settings"][k] for k in ("count", "seed", "steps", "size", "weights")} == {
        "count": 3, "seed": 0, "steps": 2, "size": 16, "weights": "ema",
    }  # fmt: skip
    assert facts["versions"]["torch"] == torch.__version__
    assert scene_table(facts["metrics"]) in said
    # Same weights, prompts, seeds and steps: what the run itself has measured at its end.
    last = home.rows("measured")[-1]
    for key in KEYS:
        assert facts["metrics"][key] == pytest.approx(float(last[f"val/{key}"]), abs=1e-6), key


def test_the_verb_takes_settings(home, measured, tmp_path, capsys):
    ckpt = str(home.path / "runs" / "measured")
    out = str(tmp_path / "new" / "m.json")
    evaluate(composed("raw=true", "guidance.scale=1", "seed=5"), asked(ckpt=ckpt, out=out))
    settings = json.loads(Path(out).read_text())["settings"]
    assert (settings["weights"], settings["guidance"]["scale"], settings["seed"]) == ("raw", 1, 5)
    assert capsys.readouterr().out.endswith(f"{out}\n")
    with pytest.raises(UsageError, match="ckpt is needed"):
        evaluate(composed(), asked())
    with pytest.raises(ValueError, match="count=2"):
        evaluate(composed("count=1"), asked(ckpt=ckpt))


def test_the_table_is_aligned():
    table = scene_table({key: i / 20 for i, key in enumerate(KEYS)}).splitlines()
    assert len({len(line) for line in table}) == 1
    assert [line.split("  ")[0] for line in table[1:]] == [
        "whole caption", "color", "shape", "size", "relation", "background", "style",
    ]  # fmt: skip
    assert re.split(r"\s{2,}", table[1]) == ["whole caption", "0.000", "0.350", "0.700"]


@pytest.mark.slow
def test_two_processes_count_what_one_does(home):
    """Five prompts a split do not divide by two; the weights before the first step are the same."""
    few = ["trainer.max_steps=1", "eval.count=5", "eval.steps=2", "metric=val/scene_accuracy"]
    root = Path(CONF).parent
    for name, more in {
        "one": [],
        "two": ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"],
    }.items():
        shutil.rmtree(home.path / "runs" / name, ignore_errors=True)
        options = home.options(f"name={name}", *few, *more)
        run(str(root / "train.py"), *options, cwd=home.path)
        result = json.loads((home.path / "runs" / name / "result.json").read_text())
        assert result["metric"] == "val/scene_accuracy"
        assert 0 <= result["value"] <= 1
    one, two = home.rows("one")[0], home.rows("two")[0]
    assert [one[f"val/{key}"] for key in KEYS] == [two[f"val/{key}"] for key in KEYS]
    assert any(float(one[f"val/{key}"]) for key in KEYS), "nothing was right, so nothing was told"
