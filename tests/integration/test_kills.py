"""A run that is killed a hundred times gives what one gives that never was."""

import json
import shutil

import pytest
import torch
from killed_runs import measured
from payloads import same
from shell import BRIEF, FROZEN, ROOT, run

KILLS = str(ROOT / "tests" / "helpers" / "kills.py")
RUN = [
    *BRIEF,
    *FROZEN,
    "logger=csv",
    "data.workers=2",
    "data.batch_size=8",
    "trainer.accumulate_grad_batches=2",
    "trainer.val_check_interval=7",
    "checkpoint.every=1",
    "+model.dropout=0.1",
    "model.channels=16",
    "optimizer.warmup=5",
]


@pytest.mark.parametrize(
    ("kills", "steps", "words"),
    [
        (4, 60, []),
        (2, 20, ["optimizer=muon"]),
        pytest.param(30, 160, [], marks=pytest.mark.slow),
        pytest.param(100, 500, [], marks=[pytest.mark.slow, pytest.mark.soak]),
    ],
)
def test_kills_do_not_change_the_result(prepared, tmp_path, kills, steps, words):
    home = tmp_path / "home"
    shutil.copytree(prepared, home, symlinks=True)
    command = [*RUN, *words, f"trainer.max_steps={steps}"]
    for count, name in ((0, "whole"), (kills, "killed")):
        said = run(
            *(KILLS, str(count), "7", f"name={name}", *command),
            cwd=home,
            seconds=1500,
            OMP_NUM_THREADS="1",
        )
        told = json.loads(said.splitlines()[-1])
        log = (home / "kills-7.log").read_text()
        assert told == {"killed": count, "exit_code": 0}, log[-5000:]
    assert log.count(" resumes from step ") >= kills / 2, "many had begun to train"
    whole, killed = (home / "runs" / name for name in ("whole", "killed"))
    assert measured(killed) == measured(whole)
    payloads = [
        torch.load(found / "checkpoints" / "last.ckpt", weights_only=True)
        for found in (whole, killed)
    ]
    assert payloads[0]["global_step"] == payloads[1]["global_step"] == steps
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert same(payloads[0][part], payloads[1][part]), part
