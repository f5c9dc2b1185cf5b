"""The examples of CONTRIBUTING.md work in a package outside this repository."""

import csv
import re
import shlex

import pytest
from shell import ROOT, run

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
FILES = re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", TEXT, re.DOTALL)
[COMMANDS] = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
SMALL = "data=scenes data.count=16 data.val_count=16 data.batch_size=4 data.workers=0 data.size=16 "
SMALL += "trainer=cpu trainer.log_every_n_steps=1 trainer.max_steps=2 "
SMALL += "trainer.val_check_interval=2 logger=csv samples.n=1 "
SMALL += "samples.steps=1 eval.images.count=8 eval.images.steps=1 autoencoder=identity "
SMALL += "autoencoder.patch=4 text_encoder=labels"


@pytest.fixture
def outside(tmp_path):
    for name, text in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_each_component_is_ten_lines_of_code():
    components = [name for name, _ in FILES if name.startswith("mypackage/")]
    assert len(components) == 7
    for name, text in FILES:
        lines = [line for line in text.splitlines() if line.strip()]
        assert len(lines) <= 12, name


def test_a_package_that_python_does_not_find_is_refused_with_the_remedy(outside):
    command = [str(ROOT / "train.py"), "--config-dir", "conf", "model=conv", "eval=fast"]
    said = run(*command, *SMALL.split(), cwd=outside, expect=2)
    assert "No module named 'mypackage'" in said
    assert "install it, or give PYTHONPATH=FOLDER" in said


@pytest.mark.slow
def test_the_commands_use_all_components(outside):
    path = {"PYTHONPATH": f"{ROOT}:{outside}"}
    export, *commands = COMMANDS.strip().splitlines()
    assert export == "export PYTHONPATH=$PWD"
    train, sample = (["-m", *shlex.split(line)] for line in commands)
    run(*train, *SMALL.split(), cwd=outside, **path)
    config = (outside / "runs" / "mine" / "config.yaml").read_text()
    for name, text in FILES:
        if name.startswith("mypackage/"):
            [made] = re.findall(r"^class (\w+)", text, re.MULTILINE)
            assert made in config
    with (outside / "runs" / "mine" / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["val/fd_colour"]) > 0
    assert float(last["val/grey"]) > 0
    assert float(last["mine/weights"]) > 0
    sample += ["n=1", "steps=2", "out=a.png"]
    untrusted = [word for word in sample if not word.startswith("trust=")]
    said = run(*untrusted, cwd=outside, expect=2, **path)
    assert "trust=[mypackage]" in said
    run(*sample, cwd=outside, **path)
    assert (outside / "a.png").is_file()
