"""The command line as a user types it: whole processes, real files, nothing replaced."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw

STARTED: list[subprocess.Popen] = []
ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "train.py")
BRIEF = [
    "trainer=cpu",
    "trainer.log_every_n_steps=1",
    "data=coco",
    "data.train=shards",
    "data.val=shards",
    "data.size=16",
    "data.batch_size=4",
    "data.workers=0",
    "samples.n=2",
    "samples.steps=2",
]
FROZEN = ["autoencoder.path=runs/ae", "text_encoder=clip", "text_encoder.path=runs/clip"]
ANEW = ["stage=autoencoder", "autoencoder.path=null", "logger=csv"]


def environment(cwd: Path, **more: str) -> dict[str, str]:
    """A user's, without what this session has set."""
    mine = ("WANDB", "LDM", "HYDRA", "SLURM")
    env = {k: v for k, v in os.environ.items() if not k.startswith(mine)}
    env |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "HOME": str(cwd), "COLUMNS": "200"}
    return env | more


def run(*command: str, cwd: Path, expect: int = 0, seconds: float = 300, **more: str) -> str:
    """What a Python command prints, errors first."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=environment(cwd, **more),
        capture_output=True,
        text=True,
        errors="surrogateescape",  # paths of any bytes
        timeout=seconds,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    if expect == 2:  # a refusal of ours, about which Hydra has nothing to say
        assert "Error executing job" not in done.stderr
    return done.stderr + done.stdout


def start(*command: str, cwd: Path, **more: str) -> subprocess.Popen:
    """A Python command that goes on by itself, until the end of the test at the latest."""
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env=environment(cwd, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    STARTED.append(process)
    return process


def stop_started() -> None:
    """End what a test has left running, where it failed half way."""
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.terminate()  # a sweep ends its jobs
            try:
                process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()


def train(*overrides: str, cwd: Path, expect: int = 0, **more: str) -> str:
    """A brief training."""
    return run(TRAIN, *BRIEF, *overrides, cwd=cwd, expect=expect, **more)


def tensors(run_dir: Path) -> dict:
    """A run's last checkpoint."""
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same_learning(one: dict, two: dict) -> None:
    """Two checkpoints agree to rounding where sums were taken in another order.

    Adam makes a whole step of each gradient, also of one that is only rounding: softmax cancels the
    key's bias, and states that all captions share say nothing. So moments are compared, which are
    sums of gradients, and those weights whose gradients are more than rounding. A sum in float32
    is right to some 1e-7 of its largest part: 1e-6 of the largest gradient is left for it.
    """
    [a], [b] = one["optimizer_states"], two["optimizer_states"]
    assert a["state"].keys() == b["state"].keys()
    rounding = 1e-6 * max(float(each["exp_avg"].abs().max()) for each in a["state"].values())
    names = [name for name in one["state_dict"] if not name.startswith("ema.")]
    names.sort(key=lambda name: one["state_dict"][name].ndim <= 1)  # as the optimizer's groups
    for i, moments in a["state"].items():
        mean, other = moments["exp_avg"], b["state"][i]["exp_avg"]
        assert (mean - other).abs().max() <= 1e-3 * mean.abs().max() + rounding, names[i]
        real = moments["exp_avg_sq"].sqrt() > 100 * rounding
        average = names[i].replace("denoiser.", "ema.module.")
        for name in {names[i], average} if real.any() else ():
            moved = (one["state_dict"][name] - two["state_dict"][name])[real]
            assert moved.abs().mean() < 1e-5, name


def rows(run_dir: Path) -> list[dict[str, str]]:
    """A run's metrics.csv."""
    with (run_dir / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def prepare(home: Path) -> Path:
    """Pictures in shards, and the parts that a denoiser rests on, as in the README."""
    (home / "pictures").mkdir()
    colours = ["red", "green", "blue", "yellow", "black", "white", "pink", "gold"]
    captions = []
    for i, colour in enumerate(colours):
        picture = Image.new("RGB", (40, 32), "grey")
        ImageDraw.Draw(picture).ellipse((4 + i, 4, 24 + i, 24), fill=colour)
        picture.save(home / "pictures" / f"{i}.png")
        two = [f"a {colour} ball", f"the ball is {colour}"]
        captions.append(json.dumps({"file_name": f"{i}.png", "text": two}))
    (home / "pictures" / "metadata.jsonl").write_text("\n".join(captions))
    run("-m", "ldm.prepare", "folder", "images=pictures", "out=shards", "size=16", cwd=home)
    train(*ANEW, "name=ae", "trainer.max_steps=3", cwd=home)
    train("stage=clip", "name=clip", "trainer.max_steps=2", "vocab_size=600", cwd=home)
    return home


def wait_for(condition, seconds: float = 120) -> None:
    """Until something has come to pass."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.05)


def processes(word: str) -> list[int]:
    """The processes whose command line holds a word."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word in path.read_bytes().decode("utf-8", "replace"):
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found
