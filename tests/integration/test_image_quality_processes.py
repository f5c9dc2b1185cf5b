"""The metrics of painted pictures through the command line: processes, signals, and afterwards."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from shell import TRAIN, rows, run, start, wait_for

STEPS = 2
# So many steps that a signal comes before all is painted.
PICTURES = ["eval=fast", "eval.images.count=21", "eval.images.batch=4", "eval.images.steps=20"]
RUN = [
    "trainer=cpu",
    f"trainer.max_steps={STEPS}",
    "trainer.val_check_interval=1",
    "trainer.log_every_n_steps=1",
    "logger=csv",
    "data=scenes",
    "data.count=30",
    "data.val_count=20",
    "data.size=16",
    "data.batch_size=6",
    "data.workers=0",
    "model.channels=16",
    "model.groups=8",
    "model.multipliers=[1,2]",
    "model.attention=[false,true]",
    "autoencoder=identity",
    "optimizer.warmup=1",
    "samples.n=1",
    "samples.steps=1",
    *PICTURES,
]
# As the run has painted: in other batches, or on another number of threads, sums are taken in
# another order, and a pixel may be rounded to another of 256 values.
ALIKE = {"OMP_NUM_THREADS": "1"}
SAME = ["count=21", "steps=20", "batch=4", "scenes=false"]


def measured(run_dir: Path, step: int) -> dict[str, float]:
    """What a run has measured on pictures at a step."""
    (row,) = (row for row in rows(run_dir) if row["step"] == str(step))
    found = {k.removeprefix("val/"): v for k, v in row.items() if k.startswith("val/")}
    return {k: float(v) for k, v in found.items() if not k.startswith("loss")}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a run that nothing has disturbed, on one process."""
    path = tmp_path_factory.mktemp("home")
    run(TRAIN, *RUN, "name=whole", cwd=path, **ALIKE)
    assert {"fd_clip", "kid", "precision", "clip_score", "cmmd"} < measured(
        path / "runs" / "whole", 0
    ).keys()
    return path


@pytest.mark.slow
def test_two_processes_measure_the_same_as_one(home):
    """Before the first step, where the weights are the same: 21 pictures in six pieces."""
    expected = measured(home / "runs" / "whole", 0)
    assert shared(home, "by-two", world=2) == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_three_processes_measure_the_same_as_one(home):
    """In two pieces: one process has none."""
    batch = "eval.images.batch=12"
    run(TRAIN, *RUN, batch, "trainer.max_steps=1", "name=twelve", cwd=home, **ALIKE)
    expected = measured(home / "runs" / "twelve", 0)
    assert shared(home, "by-three", batch, world=3) == pytest.approx(expected, rel=1e-6)


def shared(home: Path, name: str, *options: str, world: int) -> dict[str, float]:
    """What some processes measure together before the first step."""
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={world}"]
    ddp += [f"eval.images.cache=cache-{name}", "trainer.max_steps=1"]
    run(TRAIN, *RUN, *ddp, *options, f"name={name}", cwd=home, **ALIKE)
    assert len(list((home / f"cache-{name}").glob("real-clip-*.safetensors"))) == 2
    assert not list((home / f"cache-{name}").glob("pieces-*"))
    assert not list((home / "runs" / name / "eval").glob("step=*"))
    return measured(home / "runs" / name, 0)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, STEPS])
def test_a_signal_during_an_evaluation_changes_nothing(home, step):
    """In the middle of a run, and at its last validation, after which there is no step."""
    name = f"ended-{step}"
    process = start(TRAIN, *RUN, f"name={name}", cwd=home, **ALIKE)
    run_dir = home / "runs" / name
    wait_for(lambda: list(run_dir.glob(f"eval/step={step:08d}-*/*.safetensors")))
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 75, said
    painted = list(run_dir.glob(f"eval/step={step:08d}-*/*.safetensors"))
    assert 0 < len(painted) < 6, "it did not paint the rest first"
    assert json.loads((run_dir / "result.json").read_text())["status"] == "preempted"
    said = run(TRAIN, *RUN, f"name={name}", cwd=home, **ALIKE)
    assert f"finished at step {STEPS}" in said
    for number in range(STEPS + 1):
        assert measured(run_dir, number) == measured(home / "runs" / "whole", number)
    one, other = (
        json.loads((home / "runs" / name / "result.json").read_text()) for name in (name, "whole")
    )
    assert (one["status"], one["value"]) == (other["status"], other["value"])
    assert one["checkpoint"] == other["checkpoint"] == "checkpoints/step=00000002_end.ckpt"
    assert "is finished" in run(TRAIN, *RUN, f"name={name}", cwd=home)


@pytest.mark.slow
def test_one_process_continues_an_evaluation_of_two(home):
    """A signal to one of them, before the first step, ends both."""
    options = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    run_dir = home / "runs" / "two"
    first = start(TRAIN, *RUN, *options, "name=two", cwd=home, **ALIKE)
    wait_for(lambda: list(run_dir.glob("eval/step=00000000-*/*.safetensors")))
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=120)[0]
    assert first.returncode == 75, said
    assert not list(run_dir.glob("checkpoints/*.ckpt")), "there was nothing to save"
    (pieces,) = run_dir.glob("eval/step=00000000-*")
    assert 2 <= len(list(pieces.iterdir())) < 6
    run(TRAIN, *RUN, "name=two", cwd=home, **ALIKE)
    for number in range(STEPS + 1):
        expected = measured(home / "runs" / "whole", number)
        assert measured(run_dir, number) == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_a_run_measures_the_same_as_ldm_evaluate(home):
    """The same captions, seeds, steps, weights and real pictures."""
    run("-m", "ldm.evaluate", "ckpt=runs/whole", *SAME, cwd=home, **ALIKE)
    offline = json.loads((home / "runs" / "whole" / "metrics.json").read_text())
    online = measured(home / "runs" / "whole", STEPS)
    # A training has another memory layout: a few bytes of its images differ by one grey level.
    scores = {k: online.pop(k) for k in ("clip_score", "clip_score_chance")}
    assert scores == pytest.approx({k: offline["metrics"][k] for k in scores}, rel=1e-4)
    assert online == pytest.approx({k: offline["metrics"][k] for k in online}, rel=1e-5)
    (subset,) = home.glob("runs/whole/eval/subset-*.json")
    assert offline["protocol"]["subset"] in subset.name, "one file, for both"


@pytest.mark.slow
def test_the_raw_weights_too(home):
    shutil.rmtree(home / "runs" / "raw", ignore_errors=True)
    run(TRAIN, *RUN, "eval.images.raw=true", "name=raw", cwd=home, **ALIKE)
    run("-m", "ldm.evaluate", "ckpt=runs/raw", *SAME, "raw=true", "out=raw.json", cwd=home, **ALIKE)
    offline = json.loads((home / "raw.json").read_text())["metrics"]
    online = measured(home / "runs" / "raw", STEPS)
    raw = {k.removesuffix("_raw"): v for k, v in online.items() if k.endswith("_raw")}
    assert raw == pytest.approx({k: offline[k] for k in raw}, rel=1e-5)
    assert raw["fd_clip"] != online["fd_clip"]
