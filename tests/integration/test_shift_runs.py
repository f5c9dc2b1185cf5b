"""scheduler.shift=auto: config.yaml has the number, and the same command goes on with it."""

from pathlib import Path

import yaml
from shell import TRAIN, run

WORDS = ["name=s", "scheduler=flow", "objective=flow", "scheduler.shift=auto", "trainer=cpu"]
WORDS += ["data.count=8", "data.val_count=4", "data.batch_size=4", "data.workers=0", "eval=none"]
WORDS += ["model.channels=16", "model.heads=2", "samples.n=0", "logger=csv", "validate_first=false"]


def test_a_run_stores_its_shift_and_resumes(tmp_path: Path):
    said = run(TRAIN, *WORDS, "trainer.max_steps=1", cwd=tmp_path)
    assert "scheduler.shift=auto: 0.433, for latents of 12 x 8 x 8" in said
    stored = yaml.safe_load((tmp_path / "runs/s/config.yaml").read_text())
    assert stored["scheduler"]["shift"] == (12 * 8 * 8 / 4096) ** 0.5
    said = run(TRAIN, *WORDS, "trainer.max_steps=2", cwd=tmp_path)
    assert "keeps scheduler.shift=0.433" in said
    assert "finished at step 2" in said
