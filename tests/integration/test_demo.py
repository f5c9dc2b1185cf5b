"""`make demo` as a newcomer runs it, but shorter."""

import json
import shlex
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from shell import ROOT, run

from ldm.cli.evaluate import format_scene_table
from ldm.utils.images import from_uint8, make_captioned_grid

SHORT = {
    "train.py": "logger=csv data.count=200 data.val_count=16 trainer.max_steps=4 "
    "samples.n=2 samples.steps=2 eval.scenes.count=2 eval.scenes.steps=2",
    "ldm.evaluate": "count=2 steps=2",
    "sample.py": "steps=2",
}


def commands():
    """What the target types, without the lines that make the environment."""
    make = ["make", "--dry-run", "--no-print-directory", "demo"]
    typed = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = [shlex.split(line) for line in typed.splitlines() if ".venv/bin/python " in line]
    return [line for line in lines if line[0] == ".venv/bin/python"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_the_demo_ends_in_a_picture(tmp_path):
    for name in ("train.py", "sample.py", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    said = {}
    for _, *command in commands():
        called = command[1] if command[0] == "-m" else command[0]
        said[called] = run(*command, *SHORT[called].split(), cwd=tmp_path)
    assert list(said) == list(SHORT), "all of the target, in its order"

    metrics = json.loads((tmp_path / "runs/demo/metrics.json").read_text())["metrics"]
    assert format_scene_table(metrics) in said["ldm.evaluate"]
    picture = tmp_path / said["sample.py"].splitlines()[-1]
    prompts = (ROOT / "docs/demo.txt").read_text().splitlines()
    assert len(prompts) == 8
    facts = Image.open(picture).text
    assert json.loads(facts["prompt"]) == prompts
    singles = sorted(picture.parent.glob(f"{picture.stem}_*.png"))
    assert [Image.open(single).text["prompt"] for single in singles] == prompts
    images = [from_uint8(np.array(Image.open(single))) for single in singles]
    expected = make_captioned_grid(images, prompts)
    assert np.array_equal(np.asarray(Image.open(picture)), np.asarray(expected))
