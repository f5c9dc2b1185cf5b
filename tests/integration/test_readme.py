"""The commands of README and docs are what a newcomer types: they compose, and some run."""

import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

from ldm.cli.augment import AUGMENT_TEXT_OPTIONS as AUGMENT
from ldm.cli.clip import CLIP_TEXT_OPTIONS as CLIP
from ldm.cli.phema import PHEMA_TEXT_OPTIONS as PHEMA
from ldm.config.composition import CONF_DIR
from ldm.config.measurement import EVALUATE_TEXT_OPTIONS as EVALUATE

ROOT = Path(__file__).parents[2]
COCO = ROOT.parent / "shared" / "data" / "coco_mini"
TEXTS = ("ckpt", "prompt", "prompts", "negative", "out", "images", "annotations", "image")
TEXTS += ("mask", "source", "style")


def blocks(page="README.md"):
    return re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), flags=re.S)


def commands():
    pages = [*blocks(), *blocks("docs/explained.md"), *blocks("docs/sweeps.md")]
    pages += [*blocks("docs/evaluation.md"), *blocks("docs/phema.md"), *blocks("docs/clip.md")]
    pages += [
        *blocks("docs/img2img.md"),
        *blocks("docs/inpainting.md"),
        *blocks("docs/superres.md"),
    ]
    lines = [line for block in pages for line in block.splitlines()]
    return [
        shlex.split(line, comments=True)[1:]
        for line in lines
        if line.startswith("python ") and "benchmarks/" not in line
    ]


def jobs(overrides):
    """The jobs of a sweep; where a search draws its own values, one with both ends."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    own = [o for o in parsed if not o.is_hydra_override()]
    hydra = [o.input_line for o in parsed if o.is_hydra_override()]
    values = []
    for override in own:
        if override.is_interval_sweep():
            ends = override.value().start, override.value().end
            values.append([f"{override.key_or_group}={end}" for end in ends])
        else:
            ((first, *rest),) = [BasicSweeper.split_arguments([override], None)[0]]
            values.append([text for (text,) in (first, *rest)])
    return [[*hydra, *job] for job in itertools.product(*values)]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_command_composes(command):
    called, *arguments = command[1:] if command[0] == "-m" else command
    root = called.removeprefix("ldm.").removesuffix(".py")
    if root == "compare":
        assert all(a.startswith(("runs/", "metric=", "out=")) for a in arguments)
        return
    assert Path(CONF_DIR, f"{root}.yaml").is_file()
    if root == "prepare":
        arguments[0] = f"source={arguments[0]}"
    own = {"evaluate": EVALUATE, "phema": PHEMA, "clip": CLIP, "augment": AUGMENT}
    texts = own.get(root, TEXTS)
    overrides = [
        a for a in arguments if a not in ("...", "-m") and a.partition("=")[0] not in texts
    ]
    assert all("=" in a for a in overrides)
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        many = "-m" in arguments or root == "evaluate"
        for job in jobs(overrides) if many else [overrides]:
            assert compose(root, overrides=job)


def test_every_option_is_told():
    table = re.search(r"\| group \| options \|\n(.*?)\n\n", (ROOT / "README.md").read_text(), re.S)
    told = "data scheduler objective sampler guidance model autoencoder text_encoder eval trainer"
    more = ["strategy", "logger", "early_stop", "hydra/launcher", "features"]
    more += ["weighting", "loss", "timestep_sampler", "task", "style_encoder"]
    for group in [*told.split(), *more]:
        row = re.search(rf"\| .*`{group}`.*\|", table[1])[0]
        for path in Path(CONF_DIR, group).glob("*.yaml"):
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
