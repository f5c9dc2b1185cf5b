"""MLflow's file store, read back."""

import csv

import pytest
from PIL import Image

pytest.importorskip("mlflow", reason="MLflow is not installed")

from mlflow.tracking import MlflowClient

from ldm.training.loggers.mlflow import MlflowRun

OVERRIDES = ["scheduler=cosine", "optimizer.lr=1e-3"]


@pytest.fixture(autouse=True)
def file_store(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # else MLflow wants a database
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/store")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)


def log_steps(run_dir, steps, *, status="finished", **settings):
    how = {"name": "demo/scheduler=cosine", "overrides": OVERRIDES} | settings
    logger = MlflowRun(run_dir=run_dir, **how)
    logger.log_hyperparams({"optimizer": {"lr": 1e-3}, "max_steps": steps[-1]})
    logger.finalize("success")
    for step in steps:
        logger.log_metrics(metrics={"train/loss": 0.5 + step}, step=step)
    logger.log_image("samples", [Image.new("RGB", (4, 4), "red")], step=steps[-1])
    logger.log_table("ranking", ["run", "val/loss"], [["a,b", 0.5], ["c", None]])
    logger.finish(status=status)
    return MlflowClient().get_run((run_dir / "mlflow_id").read_text().strip())


def test_settings_metrics_images_and_tables_are_in_the_store(tmp_path):
    run = log_steps(tmp_path, range(3), tags={"team": "vision"})
    client = MlflowClient()
    assert client.get_experiment(run.info.experiment_id).name == "ldm"
    assert (run.info.run_name, run.info.status) == ("scheduler=cosine", "FINISHED")
    own = {"sweep": "demo", "scheduler": "cosine", "team": "vision"}
    assert own.items() <= run.data.tags.items()
    assert run.data.params == {"optimizer/lr": "0.001", "max_steps": "2"}
    found = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(one.step, one.value) for one in found] == [(0, 0.5), (1, 1.5), (2, 2.5)]
    [image] = tmp_path.glob("store/*/*/artifacts/images/samples*step+2*.png")
    assert Image.open(image).getpixel((0, 0)) == (255, 0, 0)
    [table] = tmp_path.glob("store/*/*/artifacts/ranking.csv")
    with table.open(newline="") as file:
        assert list(csv.reader(file)) == [["run", "val/loss"], ["a,b", "0.5"], ["c", ""]]


@pytest.mark.parametrize(("status", "name"), [("failed", "FAILED"), ("preempted", "KILLED")])
def test_a_resumed_run_continues_its_run(tmp_path, status, name):
    first = log_steps(tmp_path, range(2), status=status)
    assert first.info.status == name
    second = log_steps(tmp_path, range(2, 4), experiment_name="another")
    assert second.info.run_id == first.info.run_id
    assert second.info.status == "FINISHED"
    found = MlflowClient().get_metric_history(first.info.run_id, "train/loss")
    assert [one.step for one in found] == [0, 1, 2, 3]


def test_a_single_run_is_in_the_experiment_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    run = log_steps(tmp_path, range(1), name="alone")
    assert MlflowClient().get_experiment(run.info.experiment_id).name == "mine"
    assert "scheduler" not in run.data.tags
    assert run.info.run_name == "alone"


def test_a_store_that_cannot_be_used_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"logger=mlflow cannot be used: .*nowhere"):
        log_steps(tmp_path, range(1), tracking_uri="nowhere://x")
    (tmp_path / "mlflow_id").write_text("0123\n")
    with pytest.raises(ValueError, match=r"logger=mlflow cannot be used: .*0123"):
        log_steps(tmp_path, range(1))


def test_an_error_in_the_middle_does_not_stop_the_training(tmp_path, monkeypatch, capsys):
    logger = MlflowRun(run_dir=tmp_path, name="x", overrides=[])
    logger.log_hyperparams({})
    (tmp_path / "store").rename(tmp_path / "gone")
    for step in range(3):
        logger.log_metrics({"train/loss": 1.0}, step=step)
    logger.finish(status="finished")
    assert capsys.readouterr().out.count("MLflow did not take train/loss: ") == 1
