"""Several loggers at once, one of a team's own among them; the evaluation of a logged run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import wandb
import wandb_files
from evaluated_runs import COLOURS, Home, asked, composed
from shell import ROOT, TRAIN, run

from ldm.cli.evaluate import evaluate_points
from ldm.training.loggers.wandb import get_wandb_id
from ldm.utils.errors import UsageError

OUTSIDE = ROOT / "tests" / "helpers" / "outside"
TINY = "trainer=cpu trainer.log_every_n_steps=1 data.count=12 data.val_count=8 data.size=16 "
TINY += "data.batch_size=4 data.workers=0 model.channels=16 model.groups=8 model.multipliers=[1,2] "
TINY += "model.attention=[false,true] samples.n=1 samples.steps=1 eval=none "
TINY += "trainer.val_check_interval=2 checkpoint.every=2"


@pytest.mark.slow
def test_a_run_with_four_loggers_is_preempted_and_resumes(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="MLflow is not installed")
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from mlflow.tracking import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    env = {"PYTHONPATH": f"{ROOT}{os.pathsep}{OUTSIDE}"}
    store = f"file:{tmp_path}/store"
    command = [TRAIN, "--config-dir", str(OUTSIDE / "teampackage" / "conf"), "name=four"]
    command += ["logger=[wandb,tensorboard,mlflow,team]", "logger.project=faces", *TINY.split()]
    command += [f"logger.mlflow.tracking_uri={store}", "logger.wandb.artifact=best"]
    said = run(
        *command, "trainer.max_steps=4", "trainer.max_hours=1e-9", cwd=tmp_path, **env, expect=75
    )
    assert "note: the setting logger.project is called logger.wandb.project now" in said
    said = run(*command, "trainer.max_steps=6", cwd=tmp_path, **env)
    assert "runs/four resumes from step 1: " in said
    assert "trainer.max_steps was 4, is 6: the learning rate at step 1 " in said

    four = tmp_path / "runs" / "four"
    first, second = wandb_files.of_run(four)
    assert (first.project, first.alerts) == (
        "faces",
        [("WARN", "run preempted", "runs/four at step 1 was preempted")],
    )
    assert first.id == second.id
    [[reference]] = second.artifacts.values()
    assert reference.startswith(f"file://{four}/checkpoints/step=")
    events = EventAccumulator(str(four / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [e.step for e in events.Images("samples")] == [2, 4, 6]
    client = MlflowClient(store)
    found = client.get_run((four / "mlflow_id").read_text().strip())
    assert found.info.status == "FINISHED"
    losses = client.get_metric_history(found.info.run_id, "val/loss")
    assert [one.step for one in losses] == [0, 2, 4, 6]
    team = (four / "team.txt").read_text()
    assert "seed 0\n" in team
    assert "run preempted: runs/four at step 1 was preempted\n" in team
    assert "step 6: val/loss, " in team


def test_a_logger_without_its_package_is_refused_at_once(tmp_path):
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *more: None if name == 'mlflow' else find(name, *more)\n"
    )
    env = {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path / 'hidden'}"}
    said = run(TRAIN, "name=x", "logger=mlflow", cwd=tmp_path, **env, expect=2)
    assert "logger=mlflow needs a package: pip install mlflow" in said
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def home(tiny_clip, tmp_path_factory) -> Home:
    path = tmp_path_factory.mktemp("home")
    tiny_clip.save(path / "clip")
    home = Home(path)
    home.train("sweep/first", "trainer.max_steps=2", "eval=none")
    (path / "runs/sweep/first/config.yaml").write_text(
        "name: sweep/first\nlogger: {wandb: {project: faces, tags: [x]}}\n"
    )
    return home


def evaluate(run_dir: Path, *points: dict) -> None:
    settings = ["count=8", "real=8", "batch=8", "log=true", "scenes=false", *COLOURS]
    cfgs = [(p, composed(*settings, *(f"{k}={v}" for k, v in p.items()))) for p in points]
    evaluate_points(cfgs, asked(ckpt=run_dir, out=run_dir))
    wandb.teardown()


@pytest.fixture
def offline(monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")


def test_an_evaluation_adds_numbers_and_images_to_the_runs_own_wandb_run(home, offline):
    run_dir = home.path / "runs" / "sweep" / "first"
    made = get_wandb_id(run_dir)
    evaluate(run_dir, {})
    (found,) = wandb_files.of_run(run_dir)
    assert (found.id, found.project, found.group, found.name) == (made, "faces", "sweep", "first")
    assert found.exit_code == 0
    metrics = json.loads((run_dir / "metrics.json").read_text())["metrics"]
    assert found.series("eval/fd_colours") == {2: metrics["fd_colours"]}
    assert found.series("eval/images/_type") == {2: "images/separated"}
    assert "overrides" not in found.config
    evaluate(run_dir, {"steps": "1"}, {"steps": "2"})
    found = wandb_files.of_run(run_dir)[-1]
    assert found.series("eval/images/steps=1/_type") == {2: "images/separated"}
    (table,) = run_dir.glob("wandb/offline-run-*/files/media/table/eval/curve*.json")
    assert json.loads(table.read_text())["columns"][:2] == ["steps", "fd_colours"]


def test_a_run_without_wandb_or_under_way_is_refused_before_it_is_measured(home, tmp_path):
    run_dir = home.path / "runs" / "sweep" / "first"
    with pytest.raises(UsageError, match="log=true adds to the W&B run of a training, and ckpt"):
        evaluate(tmp_path, {})
    get_wandb_id(run_dir)
    code = "import sys, ldm.utils.locks as locks; from pathlib import Path\n"
    code += "lock = locks.lock_directory(Path(sys.argv[1])); print('locked', flush=True); input()"
    command = [sys.executable, "-c", code, str(run_dir)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(UsageError, match=r"log=true: .* is being trained"):
            evaluate(run_dir, {})
        other.communicate(b"\n")
