"""Sweeps through the command line: each job a run of its own, whatever happens to the others."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import wandb_files
from hypothesis import given
from hypothesis import strategies as st
from killed_runs import measured
from PIL import Image
from shell import (
    ANEW,
    BRIEF,
    FROZEN,
    ROOT,
    TRAIN,
    environment,
    processes,
    rows,
    run,
    start,
    tensors,
    train,
    wait_for,
)

from ldm.experiments.jobs import SweepJob, format_job_label
from ldm.experiments.launchers.local import LocalMachine
from ldm.utils.locks import InUseError, is_directory_locked, lock_directory

QUICK = [*ANEW, "trainer.max_steps=4", "trainer.val_check_interval=2", "checkpoint.every=1"]


@pytest.fixture
def home(prepared, tmp_path):
    """A folder with shards and trained parts."""
    shutil.copytree(prepared, tmp_path / "home", symlinks=True)
    return tmp_path / "home"


def result(run_dir):
    return json.loads((run_dir / "result.json").read_text())


def test_the_headline(home):
    """python train.py -m scheduler=cosine,linear: two runs, a W&B group, a ranking, pictures."""
    brief = ["name=both", "trainer.max_steps=2", "trainer.val_check_interval=2", *FROZEN]
    said = train("-m", "scheduler=cosine,linear", *brief, cwd=home)
    both = home / "runs" / "both"
    assert sorted(p.name for p in both.iterdir() if p.is_dir()) == [
        "scheduler=cosine",
        "scheduler=linear",
    ]
    records = []
    for name in ("cosine", "linear"):
        job = both / f"scheduler={name}"
        assert result(job)["status"] == "finished"
        assert f"ldm.diffusion.schedules.{name}" in (job / "config.yaml").read_text()
        for needed in ("output.log", "train.log", ".hydra/overrides.yaml", "metrics.csv"):
            assert (job / needed).is_file(), needed
        (file,) = job.glob("wandb/offline-run-*/*.wandb")
        record = wandb_files.read(file)
        assert record.id == (job / "wandb_id").read_text().strip()
        assert (record.group, record.name) == ("both", f"scheduler={name}")
        assert f"scheduler={name}" in record.tags
        assert record.config["data"]["batch_size"] == 4
        logged = {}
        for row in record.history:
            step = row.get("trainer/global_step")
            logged |= {(int(step), k): v for k, v in row.items() if step is not None}
        for row in rows(job):
            for key in ("train/loss", "val/loss", "val/loss_t3", "images_seen"):
                if row[key]:
                    assert logged[int(row["step"]), key] == pytest.approx(float(row[key]), rel=1e-6)
        shown = {key.partition("/")[0] for row in record.history for key in row}
        assert {"samples", "ranking"} <= shown
        records.append(record)
    assert records[0].id != records[1].id
    with (both / "ranking.csv").open() as file:
        table = list(csv.DictReader(file))
    assert {row["scheduler"] for row in table} == {"cosine", "linear"}
    values = [float(row["val/loss"]) for row in table]
    assert values == sorted(values)
    found = [result(both / f"scheduler={name}")["value"] for name in ("cosine", "linear")]
    assert values == pytest.approx(sorted(found), rel=1e-6)
    assert "| scheduler=cosine" in said
    assert "| scheduler=cosine" in (both / "ranking.md").read_text()
    for picture in ("curves.png", "samples.png"):
        with Image.open(both / picture) as image:
            assert image.width > 600

    again = train("-m", "scheduler=linear,cosine", *brief, cwd=home)
    assert "2 jobs, 2 of them finished" in again
    assert len(list(both.glob("*/wandb/offline-run-*"))) == 2, "nothing ran again"


@pytest.mark.slow
def test_a_job_that_fails_stops_no_other_and_runs_again(home):
    command = ["-m", "name=three", "data.train=shards,elsewhere,shards/.", *QUICK]
    said = train(*command, cwd=home, expect=1)
    assert "data.train=elsewhere: failed:" in said
    assert "1 of 3 jobs did not finish" in said
    three = home / "runs" / "three"
    failed = result(three / "data.train=elsewhere")
    assert failed["status"] == "failed"
    assert "elsewhere" in failed["error"]
    fine = [path for path in three.iterdir() if path.is_dir() and "elsewhere" not in path.name]
    assert [result(path)["status"] for path in fine] == ["finished", "finished"]
    before = [(path / "output.log").read_text() for path in fine]

    shutil.copytree(home / "shards", home / "elsewhere")
    said = train(*command, cwd=home)
    assert "3 jobs, 2 of them finished" in said
    assert result(three / "data.train=elsewhere")["status"] == "finished"
    assert [(path / "output.log").read_text() for path in fine] == before
    assert "failed" not in (three / "ranking.md").read_text()


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_as_if_nothing_had_been(home):
    command = ["-m", "optimizer.lr=1e-3,2e-3", *QUICK, "trainer.max_steps=30", "checkpoint.every=3"]
    train(*command, "name=whole", cwd=home)
    second = home / "runs" / "killed" / "optimizer.lr=0.002"
    command.append("logger=wandb")
    process = start(TRAIN, *BRIEF, *command, "name=killed", cwd=home)
    wait_for(lambda: any(second.glob("checkpoints/step=*06.ckpt")))
    process.kill()
    process.wait()
    wait_for(lambda: not processes(f"name='killed/{second.name}'"), seconds=10)
    assert not (second / "result.json").exists()
    first = second.with_name("optimizer.lr=0.001")
    kept = (first / "output.log").stat().st_mtime

    said = train(*command, "name=killed", cwd=home)
    assert "2 jobs, 1 of them finished" in said
    assert "resumes" in (second / "output.log").read_text()
    assert (first / "output.log").stat().st_mtime == kept
    for job, starts in ((first, 1), (second, 2)):
        found = wandb_files.of_run(job)
        assert [file.id for file in found] == [(job / "wandb_id").read_text().strip()] * starts
        assert {file.group for file in found} == {"killed"}
        assert max(found[-1].series("val/loss")) == 30
        whole = home / "runs" / "whole" / job.name
        assert measured(job) == measured(whole)
        for name, tensor in tensors(whole)["state_dict"].items():
            assert tensor.equal(tensors(job)["state_dict"][name])


@pytest.mark.slow
def test_a_sweep_is_one_process_at_a_time_and_stops_when_told(home):
    command = [*BRIEF, "-m", "optimizer.lr=1e-3,2e-3", *QUICK, "trainer.max_steps=100000"]
    first = home / "runs" / "told" / "optimizer.lr=0.001"
    process = start(TRAIN, *command, "name=told", cwd=home)
    wait_for(lambda: any(first.glob("checkpoints/last.ckpt")))
    said = run(TRAIN, *command, "name=told", cwd=home, expect=2)
    assert f"runs/told is being worked on by process {process.pid} on" in said
    said = run(TRAIN, *BRIEF, *QUICK, "name='told/optimizer.lr=0.001'", cwd=home, expect=2)
    assert "is being worked on by" in said

    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "optimizer.lr=0.001: stopped at step" in said
    assert not first.with_name("optimizer.lr=0.002").exists(), "no other was begun"
    stopped = result(first)
    assert stopped["status"] == "preempted"
    assert stopped["checkpoint"] == f"checkpoints/step={stopped['steps']:08d}.ckpt"
    assert not processes("name='told/")


@pytest.mark.slow
def test_what_all_jobs_share_may_not_change(home):
    command = ["-m", "name=base", *QUICK, "trainer.max_steps=1", "trainer.val_check_interval=1"]
    train(*command, "seed=1,3", cwd=home)
    said = train(*command, "seed=1,2", "optimizer.warmup=7", cwd=home, expect=2)
    assert "optimizer.warmup was 100, is 7" in said
    said = train(*command, "seed=2,3,1", cwd=home)
    assert "3 jobs, 2 of them finished" in said, "a sweep may grow"
    said = train("-m", "seed=1,2", "name=a,b", *QUICK, cwd=home, expect=2)
    assert "name cannot be swept" in said
    said = train("-m", "seed=1,2", "data.sise=3", *QUICK, cwd=home, expect=2)
    assert "did you mean data.size" in said


@pytest.mark.slow
def test_a_job_that_never_began_and_one_that_was_killed_are_told(home):
    command = [*BRIEF, "-m", "name=hard", *QUICK, "trainer.max_steps=100000"]
    said = train("-m", "name=hard", "data.sise=1", *QUICK, cwd=home, expect=2)
    assert "did you mean data.size" in said
    hard = home / "runs" / "hard"
    assert not (hard / "sweep.json").exists(), "what was refused binds nobody"
    hot = ["optimizer.lr=1e6,1e-3", "stop_after_skips=1"]
    sweep = start(TRAIN, *command, *hot, cwd=home)
    killed = hard / "optimizer.lr=0.001"
    wait_for(lambda: any(killed.glob("checkpoints/last.ckpt")))
    (number,) = processes("name='hard/optimizer.lr=0.001'")
    os.kill(number, signal.SIGKILL)
    said, _ = sweep.communicate(timeout=60)
    assert sweep.returncode == 1
    assert "optimizer.lr=0.001: failed: it was killed (SIGKILL; out of memory?)" in said
    assert "optimizer.lr=1000000.0: failed: NotFiniteError: " in said
    with (hard / "ranking.csv").open() as file:
        table = {row["run"]: row for row in csv.DictReader(file)}
    assert sorted(row["optimizer.lr"] for row in table.values()) == ["0.001", "1000000.0"]
    assert "out of memory" in table["optimizer.lr=0.001"]["error"]
    assert len(table["optimizer.lr=1000000.0"]) < 14, "only what differs has a column"


@pytest.mark.slow
def test_a_run_is_no_sweep_and_a_sweep_no_run(home):
    brief = [*QUICK, "trainer.max_steps=1", "trainer.val_check_interval=1"]
    train("name=plain", *brief, cwd=home)
    said = train("-m", "name=plain", "seed=1,2", *brief, cwd=home, expect=2)
    assert "runs/plain is a run, and no sweep" in said
    run(TRAIN, "-m", "seed=1", "name=many", *BRIEF, *brief, cwd=home)
    said = train("name=many", *brief, cwd=home, expect=2)
    assert "runs/many is a sweep, and no run" in said
    said = train(*brief, "seed=1", "name='many/seed=1'", cwd=home)
    assert "is finished" in said, "a job is a run like any other"


def test_no_sweep_under_a_launcher(home):
    said = train("-m", "seed=1,2", *QUICK, cwd=home, expect=2, RANK="0", LOCAL_RANK="0")
    assert "without torchrun or srun" in said


@pytest.mark.slow
def test_each_job_has_a_world_of_its_own_size(home):
    """devices=2,1: the second job is neither told of the first one's ranks nor trains in them."""
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2,1", "name=worlds"]
    train("-m", *QUICK, *ddp, cwd=home)
    worlds = home / "runs" / "worlds"
    for devices in (2, 1):
        job = worlds / f"trainer.devices={devices}"
        assert f"on {devices} x cpu" in (job / "output.log").read_text()
        assert result(job)["images_seen"] == 16
        assert [path.name for path in job.glob("*.log")].count("train.log") == 1
    two, one = (tensors(worlds / f"trainer.devices={n}")["state_dict"] for n in (2, 1))
    for name, tensor in one.items():
        assert (two[name] - tensor).abs().double().mean() < 1e-6, name


@pytest.mark.slow
def test_jobs_at_once(home):
    started = time.time()
    train("-m", "seed=1,2,3", *QUICK, "name=crowd", "hydra.launcher.n_jobs=3", cwd=home)
    jobs = [home / "runs" / "crowd" / f"seed={n}" for n in (1, 2, 3)]
    began = [(job / ".hydra" / "config.yaml").stat().st_mtime for job in jobs]
    ended = [(job / "result.json").stat().st_mtime for job in jobs]
    assert started < max(began) < min(ended), "none had ended when the last began"


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_torchrun_starts_the_ranks_itself(home, nodes):
    """One directory, one log, no further processes; two agents on loopback stand for machines."""
    agents = [
        start(
            *("-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc_per_node={2 // nodes}"),
            *("--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:29417", "--rdzv_id=launched"),
            *(TRAIN, *BRIEF, *QUICK, "trainer=ddp", "trainer.accelerator=cpu"),
            cwd=home,
        )
        for _ in range(nodes)
    ]
    for agent in agents:
        said, _ = agent.communicate(timeout=180)
        assert agent.returncode == 0, said
    (found,) = [path for path in (home / "runs").iterdir() if path.name not in ("ae", "clip")]
    assert found.name == "launched"
    assert result(found)["images_seen"] == 16
    assert [path.name for path in found.glob("*.log")] == ["train.log"]
    train(*QUICK, "name=alone", cwd=home)
    alone = tensors(home / "runs" / "alone")["state_dict"]
    for name, tensor in tensors(found)["state_dict"].items():
        assert (tensor - alone[name]).abs().double().mean() < 1e-6, name


@pytest.mark.slow
def test_optuna_finds_the_better_learning_rate(home):
    search = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=6", "name=search"]
    planted = ["optimizer.lr=choice(1e-7,3e-3)", "optimizer.warmup=1", "metric=val/psnr"]
    said = train(*search, *planted, *QUICK, "trainer.max_steps=20", cwd=home)
    best = (home / "runs" / "search" / "optimization_results.yaml").read_text()
    assert "optimizer.lr: 0.003" in best, said
    jobs = {path.name for path in (home / "runs" / "search").iterdir() if path.is_dir()}
    assert jobs == {"optimizer.lr=1e-07", "optimizer.lr=0.003"}
    assert "(maximize)" in (home / "runs" / "search" / "ranking.md").read_text()


TEXT = st.text(st.characters(codec="utf-8"), max_size=40)


@given(settings=st.dictionaries(st.sampled_from(["a.b", "model", "seed"]), TEXT), other=TEXT)
def test_labels_are_names_of_directories(settings, other):
    label = format_job_label(settings)
    assert label not in (".", "..")
    assert "/" not in label
    assert len(label.encode()) < 200
    assert label == format_job_label(dict(reversed(settings.items())))
    if settings.get("seed") not in (None, other):
        assert label != format_job_label({**settings, "seed": other})


def job(label="a", *, devices=1, accelerator="gpu", nodes=1):
    return SweepJob(
        name=label,
        label=label,
        overrides=(),
        metric="val/loss",
        steps=1,
        stops=False,
        devices=devices,
        nodes=nodes,
        accelerator=accelerator,
    )


def test_jobs_get_gpus_of_their_own(monkeypatch, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import os, time;"
        "print(os.environ['CUDA_VISIBLE_DEVICES'], sorted(os.sched_getaffinity(0)));"
        "time.sleep(float(os.environ['NAP']))"
    )
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3,GPU-5")
    monkeypatch.setenv("NAP", "0.5")
    monkeypatch.chdir(tmp_path)
    machine = LocalMachine(n_jobs=2)
    with pytest.raises(ValueError, match="wants 4 GPUs, and there are 3"):
        machine.check(job(devices=4))
    with pytest.raises(ValueError, match="hydra/launcher=slurm"):
        machine.check(job(nodes=2))
    with pytest.raises(ValueError, match=r"devices=2, and fewer GPUs by hydra.launcher.dev"):
        LocalMachine(n_jobs=2, devices=1).check(job(devices=2))
    first = machine.start(job("first", devices=2))
    assert machine.start(job("third", devices=2)) is None, "one GPU is free"
    second = machine.start(job("second"))
    for process in (first, second):
        process.process.wait()
        process.end()
    monkeypatch.setenv("NAP", "0")
    third = machine.start(job("third", devices=3))
    third.process.wait()
    third.end()
    said = [
        (tmp_path / "runs" / n / "output.log").read_text() for n in ("first", "second", "third")
    ]
    assert [line.partition(" ")[0] for line in said] == ["0,3", "GPU-5", "0,3,GPU-5"]
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        shares = [set(json.loads(line.partition(" ")[2])) for line in said]
        assert not shares[0] & shares[1]
        assert shares[0] | shares[1] == set(cores)


def test_a_claim_ends_with_its_process(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from ldm.utils import locks;"
        "kept = locks.lock_directory(Path(sys.argv[1])); print('mine', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        env=environment(tmp_path),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout.readline() == "mine\n"
        assert is_directory_locked(tmp_path)
        with pytest.raises(InUseError, match=f"process {other.pid} on"):
            lock_directory(tmp_path)
    finally:
        other.kill()
        other.wait()
    assert not is_directory_locked(tmp_path)
    lock_directory(tmp_path).close()
