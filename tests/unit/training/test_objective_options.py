"""The options of the objective, from the command line to a picture."""

import json
import math
import shutil

import pytest
import torch
from PIL import Image
from shell import FROZEN, ROOT, rows, run, tensors, train

OPTIONS = [
    "scheduler=sigmoid",
    "scheduler.zero_terminal_snr=true",
    "weighting=min_snr",
    "loss=huber",
    "timestep_sampler=sobol",
    "objective.offset_noise=0.1",
    "objective.input_perturbation=0.1",
]
BRIEF = ["logger=csv", "trainer.val_check_interval=2", *FROZEN]


@pytest.fixture(scope="module")
def home(prepared, tmp_path_factory):
    home = tmp_path_factory.mktemp("home") / "home"
    shutil.copytree(prepared, home, symlinks=True)
    return home


@pytest.mark.slow
def test_a_run_with_every_option_trains_and_generates_images(home):
    train("name=all", "trainer.max_steps=2", *OPTIONS, *BRIEF, cwd=home)
    result = json.loads((home / "runs" / "all" / "result.json").read_text())
    assert result["status"] == "finished"
    table = rows(home / "runs" / "all")
    bands = [f"val/loss_t{i}" for i in range(8)]
    assert all(math.isfinite(float(table[-1][key])) for key in ["val/loss", *bands])
    run(
        str(ROOT / "sample.py"),
        "ckpt=runs/all",
        "prompt=a red ball",
        "steps=2",
        "n=1",
        "out=x.png",
        cwd=home,
    )
    assert Image.open(home / "x.png").size == (16, 16)


@pytest.mark.slow
def test_options_are_exact_under_a_restart(home):
    """Four steps, and two then two more: images and times go on where they were."""
    for steps in (2, 4):
        more = [f"trainer.max_steps={steps}", "optimizer.decay=constant"]
        train("name=parts", *more, *OPTIONS, *BRIEF, cwd=home)
    train(
        "name=whole-constant",
        "trainer.max_steps=4",
        "optimizer.decay=constant",
        *OPTIONS,
        *BRIEF,
        cwd=home,
    )
    ours, whole = (
        tensors(home / "runs" / name)["state_dict"] for name in ("parts", "whole-constant")
    )
    assert all(torch.equal(ours[key], whole[key]) for key in whole)
