"""The commands of README and docs are what a newcomer types: they compose, and some run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from PIL import Image

from ldm.cli import CONF

ROOT = Path(__file__).parent.parent
COCO = ROOT.parent / "shared" / "data" / "coco_mini"
TEXTS = ("ckpt", "prompt", "prompts", "negative", "out", "images", "annotations", "image")


def blocks(page="README.md"):
    return re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), flags=re.S)


def commands():
    pages = [*blocks(), *blocks("docs/explained.md")]
    lines = [line for block in pages for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("python ")]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_command_composes(command):
    called, *arguments = command[1:] if command[0] == "-m" else command
    root = called.removeprefix("ldm.").removesuffix(".py")
    assert Path(CONF, f"{root}.yaml").is_file()
    if root == "prepare":
        arguments[0] = f"source={arguments[0]}"
    overrides = [a for a in arguments if a != "..." and a.partition("=")[0] not in TEXTS]
    assert all("=" in a for a in overrides)
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose(root, overrides=overrides)
    assert cfg


def test_every_option_is_told():
    table = re.search(r"\| group \| options \|\n(.*?)\n\n", (ROOT / "README.md").read_text(), re.S)
    told = "data scheduler objective sampler guidance model autoencoder text_encoder eval trainer"
    for group in [*told.split(), "strategy", "logger"]:
        row = re.search(rf"\| .*`{group}`.*\|", table[1])[0]
        for path in Path(CONF, group).glob("*.yaml"):
            assert f"`{path.stem}`" in row, f"the README does not tell of {group}={path.stem}"


@pytest.mark.slow
@pytest.mark.skipif(not COCO.is_dir(), reason=f"{COCO} is not here")
def test_the_block_on_coco_runs(tmp_path):
    """From COCO's files to a picture, as typed, but for the number of steps."""
    short = "trainer.max_steps=2 trainer.val_check_interval=2 samples.n=2 samples.steps=2"
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    script = ["set -e", f'python() {{ {shlex.quote(sys.executable)} "$@"; }}']
    [block] = [block for block in blocks() if "ldm.prepare coco" in block]
    for line in block.splitlines():
        line = line.partition("  #")[0].replace("../shared/data/coco_mini", str(COCO))
        for name in ("train.py", "sample.py"):
            line = line.replace(f"python {name}", f"python {ROOT / name}")
        script.append(f"{line} {short}" if "train.py" in line else line)
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pictures = sorted((tmp_path / "runs" / "coco-first" / "samples").glob("a-man-riding-a-wave*"))
    assert len(pictures) == 5
    assert Image.open(pictures[-1]).text["prompt"] == "a man riding a wave"
