"""hydra/launcher=slurm on a real SLURM: jobs of two ranks, requeued in the middle."""

import json
import shutil
import subprocess

import pytest
from shell import ANEW, BRIEF, TRAIN, rows, start, tensors, train, wait_for

LONG = [*ANEW, "trainer=ddp", "trainer.accelerator=cpu", "trainer.max_steps=150"]
LONG += ["trainer.val_check_interval=50", "checkpoint.every=10"]
SWEEP = ["-m", "optimizer.lr=1e-3,2e-3", "name=queued", "hydra/launcher=slurm", *LONG]


@pytest.mark.slow
def test_jobs_that_are_requeued_go_on_as_if_nothing_had_been(prepared, tmp_path, cluster):
    home = tmp_path / "home"
    shutil.copytree(prepared, home, symlinks=True)
    command = [TRAIN, *BRIEF, *SWEEP, "trainer.devices=2"]
    slurm = {name: cluster[name] for name in ("SLURM_CONF", "PATH")}
    first, second = (home / "runs" / "queued" / f"optimizer.lr={lr}" for lr in ("0.001", "0.002"))

    sweep = start(*command, cwd=home, **slurm)
    for job in (first, second):
        wait_for(lambda job=job: (job / "checkpoints" / "last.ckpt").exists())
    sweep.kill()  # the jobs are SLURM's, and the same command finds them again
    sweep.communicate()
    numbers = [(job / "slurm_job_id").read_text().strip() for job in (first, second)]
    ask = {"env": cluster, "check": True, "timeout": 30}
    subprocess.run(["scontrol", "requeue", numbers[0]], **ask)  # as a preemption does
    subprocess.run(["scancel", "--signal=USR2", numbers[1]], **ask)  # as before the time limit

    again = start(*command, cwd=home, **slurm)
    said, _ = again.communicate(timeout=240)
    assert again.returncode == 0, said
    assert "2 jobs, 0 of them finished" in said
    for job, number, signal in zip((first, second), numbers, ("TERM", "USR2"), strict=True):
        assert (job / "slurm_job_id").read_text().strip() == number, "it was not submitted again"
        output = (job / "output.log").read_text()
        assert f"SIG{signal}: saving after this step" in output
        assert output.count(" begins: ") == output.count(" resumes from step ") == 1
        assert "on 2 x cpu" in output
        result = json.loads((job / "result.json").read_text())
        assert (result["status"], result["steps"]) == ("finished", 150)
        assert len({row["step"] for row in rows(job)}) == len(rows(job))

    train(*LONG, "trainer.devices=2", "optimizer.lr=2e-3", "name=whole", cwd=home)
    whole = tensors(home / "runs" / "whole")["state_dict"]
    for name, tensor in tensors(second)["state_dict"].items():
        assert tensor.equal(whole[name]), name
    assert (home / "runs" / "queued" / "ranking.md").is_file()


@pytest.mark.slow
def test_what_slurm_cannot_do_is_said_at_once(prepared, tmp_path, cluster):
    home = tmp_path / "home"
    shutil.copytree(prepared, home, symlinks=True)
    slurm = {name: cluster[name] for name in ("SLURM_CONF", "PATH")}
    said = train(*SWEEP, "trainer.devices=auto", cwd=home, expect=2, **slurm)
    assert "give trainer.devices=N" in said
    partition = "hydra.launcher.partition=nowhere"
    said = train(*SWEEP, "trainer.devices=2", partition, cwd=home, expect=2, **slurm)
    assert "invalid partition" in said
    said = train(*SWEEP, "trainer.devices=2", cwd=home, expect=2, **slurm | {"PATH": "/nowhere"})
    assert "there is no SLURM on this machine" in said
