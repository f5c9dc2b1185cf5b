"""Golden numbers of a checkout, to compare two states of the code bit for bit on one machine.

    python benchmarks/golden.py write CHECKOUT RUN OUT.json [PATTERN]     # from an empty folder
    python benchmarks/golden.py compare OLD.json NEW.json

`write` runs 21 trainings of six steps (losses, digests of weights), 36 commands of sample.py
(digests of pixels) and two evaluations (metrics) with the code of CHECKOUT and its .venv; RUN is
a trained run with the default configuration. Some ten minutes on one core; a second call goes on
where the first one ended. Set OMP_NUM_THREADS=1: sums of several threads may differ by rounding.
"""

import argparse
import csv
import hashlib
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SCENES = "data=scenes data.count=64 data.val_count=8 data.batch_size=8"
VIDEOS = "task=video data=moving_scenes data.count=32 data.val_count=4 data.batch_size=4"
SHORT = "trainer=cpu trainer.max_steps=6 trainer.val_check_interval=6 trainer.log_every_n_steps=1 "
SHORT += "logger=csv eval=none samples.n=2 samples.steps=2"
PIXELS = "autoencoder=identity autoencoder.patch="
PROMPT = "a big red heart above a little cyan star, striped, on a navy background"
ALONE = f"{SCENES} data.workers=0"

TRAININGS = {
    "default": ALONE,
    "eval": f"{ALONE} eval=[scenes,fast] eval.images.count=8",
    "eps_linear": f"{ALONE} scheduler=linear objective=eps weighting=min_snr "
    "timestep_sampler=stratified loss=huber",
    "flow": f"{ALONE} scheduler=flow objective=flow timestep_sampler=logit_normal",
    "offset": f"{ALONE} objective.offset_noise=0.1 objective.input_perturbation=0.1",
    "laplace_x0": f"{ALONE} scheduler=laplace objective=x0 weighting=soft_min_snr "
    "timestep_sampler=sobol",
    "phema": f"{ALONE} phema.lengths=[0.05,0.1] phema.every=2",
    "accumulate": f"{ALONE} trainer.accumulate_grad_batches=2",
    "workers": f"{SCENES} data.workers=2",
    "ddp": f"{ALONE} strategy=ddp trainer.devices=2",
    "unconditional": f"{ALONE} text_encoder=none",
    "labels": f"{ALONE} text_encoder=labels",
    "pixels": f"{ALONE} {PIXELS}4",
    "autoencoder": f"{ALONE} stage=autoencoder autoencoder.path=null",
    "clip": f"{ALONE} stage=clip vocab_size=600",
    "classifier": f"experiment=classifier_labels {ALONE}",
    "classifier_captions": f"experiment=classifier_scenes {ALONE}",
    "inpaint": f"{ALONE} task=inpaint init=RUN",
    "superres": f"{ALONE} task=superres {PIXELS}2 objective=x0",
    "style": f"{ALONE} style_encoder=clip init=RUN",
    "video": f"{VIDEOS} data.workers=0 init=RUN",
}
SAMPLERS = [
    "ddim",
    "ddpm",
    "euler",
    "euler_ancestral",
    "heun",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_3m",
    "unipc",
    "lcm",
]
SPACINGS = ["leading", "linspace", "karras", "logsnr", "ays"]
IMAGE = ["image=photo.png"]
SAMPLES = {
    **{f"sampler_{name}": [f"sampler={name}"] for name in SAMPLERS},
    **{f"spacing_{name}": [f"sampler.spacing={name}"] for name in SPACINGS},
    "guidance_interval": ["guidance=interval"],
    "guidance_apg": ["guidance=apg"],
    "guidance_none": ["guidance=none"],
    "guidance_rescale": ["guidance.rescale=0.7"],
    "guidance_compose": ["guidance=compose", f"prompt={PROMPT} AND a small blue circle :0.5"],
    "guidance_autoguidance": ["guidance=autoguidance", "guidance.guide=RUN"],
    "guidance_clip": ["guidance=clip"],
    "guidance_classifier": ["guidance=classifier", "guidance.classifier=runs/classifier_captions"],
    "negative": ["negative=a red circle", "previews=3"],
    "img2img": ["task=img2img", *IMAGE, "strength=0.6"],
    "img2img_invert": ["task=img2img", *IMAGE, "strength=0.6", "task.invert=true", "source=circle"],
    "inpaint_projected": ["task=inpaint_projected", *IMAGE, "mask=mask.png"],
    "inpaint_paste": [
        *("task=inpaint_projected", *IMAGE, "mask=mask.png", "paste=true", "task.rounds=2")
    ],
    "outpaint": ["task=inpaint_projected", *IMAGE, "pad=[16,0,0,0]"],
    "inpaint": ["ckpt=runs/inpaint", *IMAGE, "mask=mask.png"],
    "superres": ["ckpt=runs/superres", "image=small.png", "guidance.scale=1"],
    "style": ["ckpt=runs/style", "style=photo.png"],
    "video": ["ckpt=runs/video"],
    "raw": ["raw=true"],
    "size": ["size=96"],
    "cascade": ["cascade=[RUN,runs/superres]", "n=1"],
}
EVALUATIONS = {"scenes": ["features=[clip]"], "curve": ["guidance.scale=1,3", "features=none"]}


def digest_weights(path: Path) -> str:
    """Returns a digest of all tensors of a checkpoint."""
    state = torch.load(path, weights_only=True)["state_dict"]
    total = hashlib.sha256()
    for name in sorted(state):
        total.update(state[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def digest_pixels(path: Path) -> str:
    """Returns a digest of an image file's pixels, all frames of it."""
    total = hashlib.sha256()
    with Image.open(path) as image:
        for frame in range(getattr(image, "n_frames", 1)):
            image.seek(frame)
            total.update(np.asarray(image.convert("RGB")).tobytes())
    return total.hexdigest()[:16]


def read_losses(path: Path) -> list[dict[str, str]]:
    """Returns the rows of metrics.csv without those that tell speed."""
    with path.open() as file:
        return [
            {key: value for key, value in row.items() if value and not key.startswith("perf/")}
            for row in csv.DictReader(file)
        ]


class Checkout:
    """The commands of one state of the code."""

    def __init__(self, root: Path, run: Path) -> None:
        self.root, self.run = root.resolve(), str(run.resolve())

    def call(self, *command: str) -> str | None:
        """Runs a Python command; returns the end of its errors, None where it succeeded."""
        ours = ("WANDB", "LDM", "HYDRA", "PYTEST")
        env = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
        env |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(self.root)}
        command = [word.replace("RUN", self.run) for word in command]
        python = str(self.root / ".venv" / "bin" / "python")
        done = subprocess.run([python, *command], env=env, capture_output=True, text=True)
        return done.stderr[-300:] if done.returncode else None

    def train(self, name: str, words: str) -> object:
        """Returns losses and weights of a training, else the error."""
        script = str(self.root / "train.py")
        if error := self.call(script, *SHORT.split(), *words.split(), f"name={name}"):
            return error
        run = Path("runs", name)
        return {
            "weights": digest_weights(run / "checkpoints" / "last.ckpt"),
            "metrics": read_losses(run / "metrics.csv"),
        }

    def sample(self, name: str, words: list[str]) -> object:
        """Returns digests of the images of a command of sample.py, else the error."""
        keys = {word.partition("=")[0] for word in words}
        usual = ["n=2", "steps=6", "seed=3", f"prompt={PROMPT}"]
        usual += [] if keys & {"ckpt", "cascade"} else ["ckpt=RUN"]
        usual = [word for word in usual if word.partition("=")[0] not in keys]
        folder = Path("images", name)
        folder.mkdir(parents=True, exist_ok=True)
        out = folder / ("o.webp" if name == "video" else "o.png")
        if error := self.call(str(self.root / "sample.py"), *usual, *words, f"out={out}"):
            return error
        return {path.name: digest_pixels(path) for path in sorted(folder.iterdir())}

    def evaluate(self, name: str, words: list[str]) -> object:
        """Returns the metrics of an evaluation, else the error."""
        usual = ["-m", "ldm.evaluate", "ckpt=RUN", "count=24", "steps=5", f"out=eval_{name}"]
        if error := self.call(*usual, *words):
            return error
        found = {}
        for path in sorted(Path(f"eval_{name}").glob("*.json")):
            points = json.loads(path.read_text())
            points = points if isinstance(points, list) else [points]
            found[path.name] = [point.get("metrics") for point in points]
        return found


def write(root: Path, run: Path, out: Path, pattern: str) -> None:
    """Writes the golden numbers of a checkout, those of an earlier call kept."""
    y, x = np.mgrid[0:64, 0:64]
    photo = np.stack([x * 4, y * 4, (x + y) * 2], -1).astype(np.uint8)
    Image.fromarray(photo).save("photo.png")
    Image.fromarray(photo[::2, ::2]).save("small.png")
    Image.fromarray(((x > 20) & (x < 48)).astype(np.uint8) * 255).save("mask.png")
    found = json.loads(out.read_text()) if out.exists() else {}
    checkout = Checkout(root, run)
    for kind, commands in (("train", TRAININGS), ("sample", SAMPLES), ("evaluate", EVALUATIONS)):
        for name, words in commands.items():
            if (key := f"{kind}/{name}") not in found and pattern in key:
                found[key] = getattr(checkout, kind)(name, words)
                out.write_text(json.dumps(found, indent=1))
                print(key, str(found[key])[:100], flush=True)


def compare(old: Path, new: Path) -> None:
    """Prints what differs."""
    a, b = json.loads(old.read_text()), json.loads(new.read_text())
    for key in sorted({*a, *b}):
        if a.get(key) != b.get(key):
            print(f"DIFFERS {key}\n    {str(a.get(key))[:300]}\n    {str(b.get(key))[:300]}")
    print(f"{sum(a[key] == b.get(key) for key in a)} of {len(a)} are equal")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    writes, compares = verbs.add_parser("write"), verbs.add_parser("compare")
    for name in ("root", "run", "out"):
        writes.add_argument(name, type=Path)
    writes.add_argument("pattern", nargs="?", default="")
    compares.add_argument("old", type=Path)
    compares.add_argument("new", type=Path)
    given = vars(parser.parse_args())
    {"write": write, "compare": compare}[given.pop("verb")](**given)
