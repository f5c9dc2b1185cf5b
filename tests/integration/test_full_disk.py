"""A disk that fills up while a run lasts: it trains to its end, and says what is missing."""

import json
import shutil

import pytest
from shell import ROOT, rows, run
from world_size_runs import RUN, write

STEPS = 6
FULL = ["early_stop._target_=recorder.FillDisk", "~early_stop.folder"]
FULL += ["+early_stop.after=2", "+early_stop.room=700"]


def train(home, *more: str, expect: int = 0) -> str:
    command = [str(ROOT / "train.py"), *RUN, "trainer.devices=1", "data.workers=0", "name=run"]
    command += [f"trainer.max_steps={STEPS}", "trainer.val_check_interval=4", "checkpoint.every=1"]
    command += ["checkpoint.background=false"]
    path = f"{ROOT}:{ROOT / 'tests' / 'helpers'}"
    return run(*command, *more, cwd=home, expect=expect, PYTHONPATH=path)


@pytest.mark.slow
def test_on_a_full_disk_only_the_last_checkpoint_is_an_error(tmp_path):
    home, well = tmp_path / "hurt", tmp_path / "well"
    write(home / "shards", 40)
    shutil.copytree(home / "shards", well / "shards")
    said = train(home, *FULL, expect=1)
    for what in ("metrics.csv", "step=00000004.png", "result.json"):
        assert f"{what} cannot be written" in said
    assert said.count("metrics.csv cannot be written") == 1
    assert f"failed at step {STEPS}" in said
    assert "CheckpointError: the run's last checkpoint is missing" in said
    run_dir = home / "runs" / "run"
    assert not (run_dir / "result.json").exists()
    assert (run_dir / "checkpoints" / "last.ckpt").resolve().name == "step=00000002.ckpt"

    assert "resumes" in train(home)
    train(well)
    assert json.loads((run_dir / "result.json").read_text())["status"] == "finished"
    losses = [
        [row["train/loss"] for row in rows(folder / "runs" / "run")] for folder in (home, well)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS
