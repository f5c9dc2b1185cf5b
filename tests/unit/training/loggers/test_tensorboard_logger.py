"""TensorBoard's event files, read back."""

import pytest
from PIL import Image

pytest.importorskip("tensorboard", reason="TensorBoard is not installed")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm.training.loggers.tensorboard import TensorBoardRun


def log_steps(run_dir, steps, *, value=0.5):
    logger = TensorBoardRun(run_dir=run_dir)
    logger.log_hyperparams({"optimizer": {"lr": 1e-3}})
    logger.log_metrics({"val/loss": value}, step=0)
    logger.finalize("success")  # as Lightning does after the first validation
    logger.rewind(steps[0] - 1)
    for step in steps:
        logger.log_metrics(metrics={"train/loss": value + step}, step=step)
    logger.log_image("samples", [Image.new("RGB", (4, 4), "red")], step=steps[-1])
    logger.log_table("ranking", ["run", "val/loss"], [["a|b", 0.5], ["c", None]])
    logger.finish(status="finished")


def read(run_dir):
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    return events


def test_metrics_images_and_tables_are_in_the_event_file(tmp_path):
    log_steps(tmp_path, range(1, 4))
    events = read(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (step, 0.5 + step) for step in (1, 2, 3)
    ]
    [image] = events.Images("samples")
    assert (image.step, image.width, image.height) == (3, 4, 4)
    [text] = events.Tensors("ranking/text_summary")
    assert text.tensor_proto.string_val[0].decode() == (
        "| run | val/loss |\n| --- | --- |\n| a\\|b | 0.5 |\n| c | None |"
    )
    assert "lr: 0.001" in (tmp_path / "tensorboard" / "hparams.yaml").read_text()


def test_a_resumed_run_replaces_the_steps_that_it_repeats(tmp_path):
    log_steps(tmp_path, range(1, 5), value=0.5)
    log_steps(tmp_path, range(3, 6), value=0.25)
    assert len(list((tmp_path / "tensorboard").glob("events.*"))) == 2
    found = [(e.step, e.value) for e in read(tmp_path).Scalars("train/loss")]
    assert found == [(1, 1.5), (2, 2.5), (3, 3.25), (4, 4.25), (5, 5.25)]


def test_a_folder_that_cannot_be_written_does_not_stop_the_training(tmp_path, capsys):
    (tmp_path / "tensorboard").touch()
    logger = TensorBoardRun(run_dir=tmp_path)
    for step in range(3):
        logger.log_metrics({"train/loss": 1.0}, step=step)
    assert capsys.readouterr().out.count("TensorBoard did not take train/loss: ") == 1
