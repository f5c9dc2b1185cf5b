"""A callback, a metric and an evaluation of a team's own package: trained, resumed, evaluated."""

import json
from pathlib import Path

import pytest
from shell import ROOT, TRAIN, rows, run

OUTSIDE = ROOT / "tests" / "helpers" / "outside"
HERE = {"PYTHONPATH": f"{ROOT}:{OUTSIDE}"}
CONF = ["--config-dir", str(OUTSIDE / "teampackage" / "conf")]
FEW = ["trainer=cpu", "logger=csv", "samples.n=0", "trainer.log_every_n_steps=1"]
FEW += ["data.count=16", "data.val_count=12", "data.size=16", "data.batch_size=4", "data.workers=0"]
FEW += ["autoencoder=identity", "model.channels=16", "model.groups=8", "model.multipliers=[1,2]"]
FEW += ["model.attention=[false,true]", "features=none", "trainer.val_check_interval=2"]
QUALITY = ["eval.images.count=10", "eval.images.steps=1", "eval.images.batch=3"]
OWN = ["eval=[fast,team]", *QUALITY, "metrics=team", "callbacks=[team,lr_monitor]"]
MEASURED = ("val/team_level", "val/team_gap", "val/red_circle")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a run on one device, resumed after two of four steps."""
    home = tmp_path_factory.mktemp("home")
    for steps in (2, 4):
        train("name=one", f"trainer.max_steps={steps}", cwd=home)
    return home


def train(*words: str, cwd: Path) -> str:
    return run(TRAIN, *CONF, *FEW, *OWN, *words, cwd=cwd, **HERE)


def measured(run_dir: Path) -> list[dict[str, float]]:
    table = [{name: float(value) for name, value in row.items() if value} for row in rows(run_dir)]
    return [{name: row[name] for name in MEASURED} for row in table if "val/loss" in row]


@pytest.mark.slow
def test_the_callback_continues_in_a_resumed_run_and_logs_at_the_right_steps(home):
    table = rows(home / "runs" / "one")
    assert [row["step"] for row in table] == list("01234")
    assert [row["team/batches"] for row in table] == ["", "1", "2", "3", "4"]
    assert len(measured(home / "runs" / "one")) == 3


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(home):
    train("name=two", "trainer.max_steps=4", "trainer.devices=2", cwd=home)
    for one, two in zip(*(measured(home / "runs" / name) for name in ("one", "two")), strict=True):
        assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.slow
def test_ldm_evaluate_measures_the_same_number(home):
    words = ["device=cpu", "features=none", "scenes=false", "count=10", "batch=3", "steps=1"]
    evaluate = ["-m", "ldm.evaluate", *CONF, "ckpt=runs/one", "metrics=team", *words]
    said = run(*evaluate, cwd=home, **HERE)
    assert "team_gap" in said
    facts = json.loads((home / "runs" / "one" / "metrics.json").read_text())
    assert facts["protocol"]["metrics"] == ["team"]
    last = measured(home / "runs" / "one")[-1]
    assert facts["metrics"]["team_gap"] == pytest.approx(last["val/team_gap"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+trainer.callbacks=[{_target_: teampackage.measures.BatchCounter}]"], "callbacks=NAME"),
        (["+callbacks.mine._target_=teampackage.measures.BrightnessGap"], "and no callback: its"),
        (["+callbacks.mine=3"], "callbacks.mine names no component"),
        (["+eval.mine.every=3"], "eval.mine names no component"),
        (["callbacks.team.start=x"], "no setting 'callbacks.team.start'"),
        (["metrics=team"], "metrics are of the images of eval=fast or eval=full: add one"),
        (["stage=clip", "eval=fast"], "stage=clip trains no denoiser and reads nothing of eval"),
        (["+early_stop.foo=1"], "there is no setting 'early_stop.foo'"),
        (["+hydra.foo=1"], "there is no setting 'hydra.foo'"),
        (["callbacks=[{_target_: a.B}]"], "is added under a name, as in '+callbacks.mine._target_"),
    ],
)
def test_what_nobody_would_run_is_refused_by_name(tmp_path, words, message):
    said = run(TRAIN, *CONF, *FEW[:-2], "eval=none", *words, cwd=tmp_path, expect=2, **HERE)
    assert message in said
    assert not (tmp_path / "runs").exists()
