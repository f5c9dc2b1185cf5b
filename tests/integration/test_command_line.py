"""The command line as a user types it: whole processes, real files, nothing replaced."""

import json
import os
import random
import shutil
import signal
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from shell import (
    ANEW,
    BRIEF,
    FROZEN,
    ROOT,
    TRAIN,
    assert_same_learning,
    processes,
    rows,
    run,
    start,
    tensors,
    train,
    wait_for,
)

from ldm.config import command_line
from ldm.config.command_line import pop_text_options, quote_override, run_command
from ldm.config.suggestions import list_known_keys
from ldm.utils.errors import suggest_nearest

NASTY = 'a {dog\'s} "café", 50% = ${oops}\\ [x] (y): 🌊 --h\n$(touch pwned)'


def sample(*arguments, cwd, expect=0):
    return run(str(ROOT / "sample.py"), "steps=2", *arguments, cwd=cwd, expect=expect)


@pytest.fixture(scope="module")
def home(prepared, tmp_path_factory):
    """A folder in which all three stages were trained, as in the README."""
    home = tmp_path_factory.mktemp("home") / "home"
    shutil.copytree(prepared, home, symlinks=True)
    train("name=first", "trainer.max_steps=4", "trainer.val_check_interval=2", *FROZEN, cwd=home)
    return home


def test_a_run_leaves_what_the_plan_says(home):
    first = home / "runs" / "first"
    for name in ("config.yaml", ".hydra/config.yaml", "checkpoints/last.ckpt", "train.log"):
        assert (first / name).is_file(), name
    assert sorted(path.name for path in (first / "samples").iterdir()) == [
        "step=00000002.png",
        "step=00000004.png",
    ]
    result = json.loads((first / "result.json").read_text())
    assert result["status"] == "finished"
    assert (result["metric"], result["steps"], result["images_seen"]) == ("val/loss", 4, 16)
    assert (first / result["checkpoint"]).is_file()
    table = rows(first)
    assert [row["step"] for row in table] == ["0", "1", "2", "3", "4"]
    bands = [f"val/loss_t{i}" for i in range(8)]
    for step in (0, 2, 4):
        assert all(table[step][key] for key in ["val/loss", *bands])
        mean = sum(float(table[step][key]) for key in bands) / 8
        assert float(table[step]["val/loss"]) == pytest.approx(mean, rel=1e-5)
    for key in ("train/loss", "images_seen", "perf/images_per_s", "perf/data_wait"):
        assert table[3][key]
    assert table[4]["images_seen"] == "16"


def test_wandb_is_offline_without_a_key(home):
    first = home / "runs" / "first"
    offline = list((first / "wandb").glob("offline-run-*"))
    assert len(offline) == 1
    assert offline[0].name.endswith((first / "wandb_id").read_text().strip())
    assert list(offline[0].glob("files/media/images/*.png"))
    assert not (home / "runs" / "ae" / "wandb").exists(), "logger=csv is csv alone"


def test_checkpoints_hold_what_was_trained_and_no_more(home):
    payload = tensors(home / "runs" / "first")
    assert {name.split(".")[0] for name in payload["state_dict"]} == {"denoiser", "ema"}
    assert payload["ldm"]["images_seen"] == 16
    assert set(payload["ldm"]["frozen"]) == {"autoencoder", "text_encoder"}
    assert "_target_: ldm.models.unet.UNet" in payload["ldm"]["config"]


def test_the_same_command_again_resumes(home):
    again = ["name=first", "trainer.val_check_interval=2", *FROZEN]
    said = train(*again, "trainer.max_steps=4", cwd=home)
    assert "is finished" in said
    long = f"samples.prompts=[{'red ' * 60}ball]"
    (home / "bin").mkdir()
    (home / "bin" / "srun").touch(mode=0o755)
    path = f"{home / 'bin'}:{os.environ['PATH']}"
    said = train(*again, "trainer.max_steps=6", long, cwd=home, PATH=path)
    assert "resumes" in said
    assert "srun" not in said
    assert "get_last_lr" not in said
    assert "tokens is cut to" in said
    assert "captions were cut" not in said, "a prompt is no caption"
    first = home / "runs" / "first"
    assert [row["step"] for row in rows(first)] == list("0123456")
    assert tensors(first)["ldm"]["images_seen"] == 24
    whole = ["name=whole", "trainer.val_check_interval=2", "trainer.max_steps=6", "logger=csv"]
    train(*whole, *FROZEN, cwd=home)
    straight = tensors(home / "runs" / "whole")["state_dict"]
    for name, tensor in tensors(first)["state_dict"].items():
        assert torch.equal(tensor, straight[name]), name


@pytest.mark.slow
def test_a_run_that_does_not_get_better_ends_early(home):
    early = ["early_stop=patience", "early_stop.validations=2", "early_stop.min_delta=1e3"]
    early += ["samples.n=0"]
    options = [*ANEW, *early, "name=early", "trainer.max_steps=99", "trainer.val_check_interval=1"]
    train(*options, cwd=home)
    result = json.loads((home / "runs" / "early" / "result.json").read_text())
    assert (result["status"], result["stopped_early"], result["steps"]) == ("finished", True, 3)
    assert "is finished" in train(*options, cwd=home)
    assert not (home / "runs" / "early" / "samples").exists(), "none were asked for"


@pytest.mark.slow
def test_a_run_leaves_when_its_time_is_over(home):
    options = [*ANEW, "name=hours", "trainer.max_steps=100000", "trainer.val_check_interval=10"]
    said = train(*options, "trainer.max_hours=0.0005", cwd=home, expect=75)
    assert "its time is over: saving, then leaving" in said
    result = json.loads((home / "runs" / "hours" / "result.json").read_text())
    assert result["status"] == "preempted"
    assert result["checkpoint"] == f"checkpoints/step={result['steps']:08d}.ckpt"
    said = train(*options, "trainer.max_hours=-1", cwd=home, expect=2)
    assert "trainer.max_hours=-1 must be a number above 0" in said


@pytest.mark.slow
def test_settings_may_change_midway_where_that_is_allowed(home):
    brief = ["name=midway", "trainer.val_check_interval=2", "logger=csv", *FROZEN]
    train(*brief, "trainer.max_steps=2", cwd=home)
    more = [*brief, "trainer.max_steps=4"]
    said = train(*more, "optimizer.lr=1e-4", cwd=home, expect=2)
    assert "optimizer.lr was 0.003, is 0.0001" in said
    assert "resume.allow=[optimizer.lr]" in said
    said = train(*more, "optimizer.lr=1e-4", "resume.allow=[optimizer.lr]", cwd=home)
    assert "resumes" in said
    rate = tensors(home / "runs" / "midway")["optimizer_states"][0]["param_groups"][0]["initial_lr"]
    assert rate == 1e-4
    wider = [*brief, "trainer.max_steps=6", "optimizer.lr=1e-4", "model.channels=64"]
    said = train(*wider, "resume.allow=[model]", cwd=home, expect=2)
    assert "does not fit: denoiser." in said
    assert "(48,) in the file and (64,) here" in said


@pytest.mark.slow
def test_a_rank_that_dies_takes_the_others_along(home):
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    options = [*BRIEF, *ANEW, *ddp, "name=dies", "trainer.max_steps=100000", "checkpoint.every=20"]
    first = start(TRAIN, *options, cwd=home)
    run_dir = home / "runs" / "dies"
    wait_for(lambda: any(run_dir.glob("checkpoints/step=*.ckpt.json")))
    (second,) = set(processes("name=dies")) - {first.pid}
    os.kill(second, signal.SIGKILL)
    said, _ = first.communicate(timeout=60)
    assert first.returncode not in (0, 75), said
    assert json.loads((run_dir / "result.json").read_text())["status"] == "failed"
    wait_for(lambda: not processes("name=dies"), seconds=30)
    saved = max(run_dir.glob("checkpoints/step=*.ckpt"))
    steps = int(saved.stem.partition("=")[2])
    assert "resumes" in train(*options[len(BRIEF) :], f"trainer.max_steps={steps + 2}", cwd=home)


@pytest.mark.slow
@pytest.mark.parametrize("told", ["the first", "all"])
@pytest.mark.parametrize("devices", [1, 2])
def test_a_run_that_is_told_to_leave_saves_first(home, told, devices):
    """SIGTERM to one of its processes or to all: code 75, and nothing is lost."""
    name = f"left-{devices}-{told[:3]}"
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={devices}"]
    options = [*BRIEF, *ANEW, *ddp, f"name={name}", "trainer.val_check_interval=10"]
    process = start(TRAIN, *options, "trainer.max_steps=100000", "checkpoint.every=20", cwd=home)
    run_dir = home / "runs" / name
    wait_for(lambda: any(run_dir.glob("checkpoints/step=*.ckpt.json")))
    asked = [process.pid] if told == "the first" else processes(f"name={name}")
    assert len(asked) == (1 if told == "the first" else devices)
    for number in asked:
        os.kill(number, signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said
    left = json.loads((run_dir / "result.json").read_text())
    assert left["status"] == "preempted"
    assert left["checkpoint"] == f"checkpoints/step={left['steps']:08d}.ckpt"
    assert not processes(f"name={name}")
    said = train(*options, f"trainer.max_steps={left['steps'] + 2}", cwd=home)
    assert "resumes" in said
    steps = [int(row["step"]) for row in rows(run_dir)]
    assert steps == list(range(left["steps"] + 3)), "each step once"


@pytest.mark.parametrize("stage", ["diffusion", pytest.param("clip", marks=pytest.mark.slow)])
def test_two_processes_learn_what_one_does(home, stage):
    """Same number of steps, each rank with its own samples and noise: else the weights differ."""
    options = [f"stage={stage}", "trainer.max_steps=3", "logger=csv", "vocab_size=600", *FROZEN]
    options += ["optimizer.warmup=1", "trainer.val_check_interval=3"]
    train(*options, f"name={stage}-one", cwd=home)
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    train(*options, *ddp, f"name={stage}-two", cwd=home)
    one, two = (tensors(home / "runs" / f"{stage}-{n}") for n in ("one", "two"))
    assert one["global_step"] == two["global_step"] == 3
    assert one["ldm"]["images_seen"] == two["ldm"]["images_seen"] == 12
    assert_same_learning(one, two)
    losses = [
        [float(row["train/loss"]) for row in rows(home / "runs" / f"{stage}-{n}")[1:]]
        for n in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    result = json.loads((home / "runs" / f"{stage}-two" / "result.json").read_text())
    assert result["status"] == "finished"


def test_sample_takes_any_text(home):
    said = sample("ckpt=runs/first", f"prompt={NASTY}", "negative=a, b", "n=3", cwd=home)
    grid = home / said.strip().splitlines()[-1]
    assert f"3 images next to {grid.relative_to(home)}\n" in said
    singles = sorted(grid.parent.glob(f"{grid.stem}_*.png"))
    assert len(singles) == 3
    assert Image.open(grid).width == 3 * 192 + 2 * 12  # three in a row, with captions
    assert "tokens is cut to" in said.partition("Sampling")[0]
    facts = Image.open(singles[1]).text
    assert facts["prompt"] == NASTY
    assert facts["negative"] == "a, b"
    assert facts["seed"] == "1"
    assert facts["steps"] == "2"
    assert not (home / "pwned").exists()


@pytest.mark.slow
def test_sample_long_empty_and_many_prompts(home):
    long = "wave " * 2000
    said = sample("ckpt=runs/first", "size=32", "n=1", "out=none", cwd=home)
    assert "size=32: this run was trained on images of 16 pixels" in said
    assert 'without prompt="..." these are images of anything' in said
    sample("ckpt=runs/first/checkpoints/last.ckpt", f"prompt={long}", "n=1", "out=long", cwd=home)
    assert Image.open(home / "long.png").text["prompt"] == json.dumps([long])
    (home / "prompts.txt").write_text("a red ball\n\na blue ball\n")
    sample("ckpt=runs/first", "prompts=prompts.txt", "n=2", "out=many.png", cwd=home)
    assert Image.open(home / "many_003.png").text["prompt"] == "a blue ball"
    said = sample("ckpt=runs/first", "prompt=a blue ball", "seed=1", "n=1", "out=alone", cwd=home)
    assert "next to" not in said
    names = ("many_003.png", "alone_000.png", "many_002.png")
    many, alone, other = (np.asarray(Image.open(home / name)).astype(int) for name in names)
    # One of four and one alone: kernels for other batch sizes round otherwise, to a grey level.
    assert abs(many - alone).max() <= 1, "a picture depends on its own prompt and seed alone"
    assert abs(many - other).max() > 1, "another seed is seen"


@pytest.mark.slow
def test_sampling_mistakes_are_told_plainly(home):
    assert "ckpt is needed" in sample("n=1", cwd=home, expect=2)
    said = sample("ckpt=runs/frist", cwd=home, expect=2)
    assert "runs/first" in said
    assert "Traceback" not in said
    assert "stage=autoencoder" in sample("ckpt=runs/ae", cwd=home, expect=2)
    said = sample("ckpt=runs/first", "autoencoder=runs/other", cwd=home, expect=2)
    assert "runs/other" in said
    train(*ANEW, "name=ae2", "trainer.max_steps=1", cwd=home)
    said = sample("ckpt=runs/first", "autoencoder=runs/ae2", cwd=home, expect=2)
    assert "is not the autoencoder that" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_training_mistakes_are_told_plainly(home):
    said = train("name=y", "autoencoder.path=null", cwd=home, expect=2)
    assert not (home / "runs" / "y").exists(), "what is refused leaves nothing"
    assert "experiment=autoencoder_coco" in said
    said = train("name=x", "data.train=nowhere", *FROZEN, cwd=home, expect=2)
    assert "nowhere" in said
    assert "ldm.prepare" in said
    said = train("name=x", "data.size=18", *FROZEN, cwd=home, expect=2)
    assert "data.size=18 must be a multiple of 16" in said
    said = train("name=x", "trainer.accumulate_grad_batches=3", *FROZEN, cwd=home, expect=2)
    assert "data.batch_size=4" in said
    again = ["name=first", "trainer.max_steps=99", "scheduler=linear", *FROZEN]
    said = train(*again, cwd=home, expect=2)
    assert "started with other settings: scheduler" in said
    assert "names no run" in train("name=../x", cwd=home, expect=2)
    said = train("name=x", "scheduler=flow", "objective=eps", *FROZEN, cwd=home, expect=2)
    assert "objective=v" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("trainer.max_step=5", "did you mean trainer.max_steps?"),
        ("max_steps=5", "did you mean trainer.max_steps?"),
        ("scale=5", "did you mean guidance.scale?"),
        ("modle=nano", "did you mean model?"),
        ("model=nanoo", "did you mean nano?"),
        ("optimizer.lr=1e-4x", "optimizer.lr=1e-4x must be a number from 0"),
        ("+sed=3", "did you mean seed?"),
        ("weighting=p2 weighting.gama=3", "did you mean weighting.gamma?"),
        (
            "weighting.gama=3",
            "'weighting.gama' here, but there is weighting.gamma of min_snr, p2, soft_min_snr",
        ),
        ("-m weighting=p2,edm weighting.gama=3", "there is weighting.gamma of min_snr"),
        ("scheduler.shift=3", "'scheduler.shift' here, but there is scheduler.shift of flow"),
        ("logger=tensorboard logger.wandb.notes=x", "add logger='[tensorboard,wandb]'"),
        ("guidance@guidance.inner=cfg", "guidance.inner of autoguidance, classifier, clip"),
        ("data.max_steps=5", "did you mean trainer.max_steps?"),
        (
            "data=some/where",
            "data=some/where does not exist. There are: cached, coco, moving_scenes, scenes",
        ),
        ("data=/x", "for shards in a folder, give data=shards data.train=DIR data.val=DIR"),
        ("nonsense", "key=value"),
        ("seed=1,2", "train.py: seed=1,2: it takes one value here; a list stands in brackets,"),
        ("data=coco data.train=a,b", "train.py -m data.train=a,b` makes a run of each\nFalse"),
        ("--help", "the same command again resumes"),
    ],
)
def test_answers_come_before_torch_is_imported(argument, hint, tmp_path):
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['train.py', *{argument!r}.split()]\n"
        "try: runpy.run_path(sys.argv[0] and "
        f"{str(ROOT / 'train.py')!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules)\n"
    )
    said = run("-c", code, cwd=tmp_path)
    assert hint in said
    assert said.splitlines()[-1] == "False", "torch was imported"
    assert "Traceback" not in said


def test_a_warning_of_ours_is_a_sentence(monkeypatch):
    monkeypatch.setattr("sys.argv", ["x"])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # as it was, afterwards
    run_command(lambda: None, "train")
    said = [
        warnings.formatwarning("!", UserWarning, at, 3)
        for at in (command_line.__file__, "/other.py")
    ]
    assert said == ["warning: !\n", "/other.py:3: UserWarning: !\n"]


def test_help_may_be_cut_short(tmp_path):
    """As by `train.py --help | head`: the reader leaves before all is written."""
    helped = start(TRAIN, "--help", cwd=tmp_path)
    helped.stdout.close()
    assert helped.wait(timeout=60) == -signal.SIGPIPE, "it ends as other programs do"


@pytest.mark.parametrize(
    ("word", "read"),
    [
        ("guidance.guide=runs/a/step=00000250.ckpt", "guidance.guide='runs/a/step=00000250.ckpt'"),
        ("name=b", "name=b"),
        ("-m", "-m"),
        ("scheduler=cosine,linear", "scheduler=cosine,linear"),
        ("x='a=b'", "x='a=b'"),
        ("lora=[a, rank=2/b:0.8]", "lora=[a,'rank=2/b:0.8']"),
        ("x=[[a=b]]", "x=[[a=b]]"),
        ("x=a=b,c=d", "x=a=b,c=d"),
    ],
)
def test_a_file_of_ours_needs_no_quotes(word, read):
    assert quote_override(word) == read


def test_one_edit_away_is_found():
    keys, luck = list_known_keys("train"), random.Random(0)
    leaves = [key for key in keys if len(key.rpartition(".")[2]) > 3 and "_target_" not in key]
    found = 0
    for key in luck.sample(leaves, 40):
        at = luck.randrange(key.rfind(".") + 1, len(key))
        wrong = key[:at] + luck.choice(["", "x", key[at] * 2]) + key[at + 1 :]
        found += wrong in keys or f"did you mean {key}?" in suggest_nearest(wrong, keys)
    assert found >= 36


@given(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0")))
def test_text_is_taken_as_typed(text):
    before = sys.argv
    try:
        sys.argv = ["sample.py", f"prompt={text}", "n=2", "sampler=ddim"]
        assert pop_text_options(["prompt", "negative"]) == {"prompt": text}
        assert sys.argv == ["sample.py", "n=2", "sampler=ddim"]
    finally:
        sys.argv = before
