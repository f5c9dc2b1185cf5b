"""What a user gets from `pip install`: the wheel alone, in an empty folder."""

import json
import shutil
import subprocess
import sys
import zipfile

import pytest
from notebooks import read_code_cells
from shell import ROOT, run

SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "ldm", "conf", "hydra_plugins")
BRIEF = [
    *("data=scenes", "data.count=16", "data.val_count=8", "data.batch_size=4", "data.workers=0"),
    *("trainer.max_steps=1", "samples.n=0", "eval=none", "logger=csv", "validate_first=false"),
]
LOAD = """
import sys, ldm
assert "torch" not in sys.modules
pipe = ldm.load("runs/two/trainer.devices=2", "guidance.scale=2", device="cpu")
print(ldm.__file__, *pipe("a red star", seeds=[0], steps=1, output_type="pt").shape)
"""

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
BRIEF_NOTEBOOK = {
    "steps = 120 ": "steps = 4 ",
    "steps = 30 ": "steps = 4 ",
    "steps=20": "steps=4",
    "steps=10)": "steps=4)",
    "data.count=1500": "data.count=64",
    "data.count=500": "data.count=64",
    "val_check_interval=10": "val_check_interval=2",
}

# An environment without ldm[sweep]: Hydra finds no plugins of these names.
WITHOUT_SWEEP = """
import pkgutil, sys
search = pkgutil.walk_packages
def walk_packages(path=None, prefix="", onerror=None):
    found = search(path, prefix, onerror)
    return (each for each in found if "optuna" not in each.name and "submitit" not in each.name)
pkgutil.walk_packages = walk_packages
from ldm.cli.train import main
main()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The unpacked wheel of this checkout."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, f"--wheel-dir={built}", "."], cwd=source, check=True, timeout=120)
    [file] = built.glob("ldm-*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(built / "unpacked")
    return built / "unpacked"


def test_the_wheel_holds_all_files(wheel):
    def files(folder, pattern):
        return {str(path.relative_to(folder)) for path in folder.glob(pattern) if path.is_file()}

    assert files(wheel / "ldm" / "conf", "**/*.yaml") == files(ROOT / "conf", "**/*.yaml")
    assert files(wheel / "ldm" / "assets", "**/*") == files(ROOT / "ldm" / "assets", "**/*")
    for package in ("ldm", "hydra_plugins"):
        assert files(wheel / package, "**/*.py") == files(ROOT / package, "**/*.py")
    [entry_points] = wheel.glob("*.dist-info/entry_points.txt")
    assert "ldm = ldm.__main__:main" in entry_points.read_text()


@pytest.mark.slow
def test_a_sweep_with_ranks_samples_and_scores_in_an_empty_folder(wheel, tmp_path):
    def ldm(*words, expect=0):
        return run("-m", "ldm", *words, cwd=tmp_path, expect=expect, PYTHONPATH=str(wheel))

    ranks = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=1,2", "name=two"]
    assert "| trainer.devices=2 |" in ldm("train", "-m", *ranks, *BRIEF)
    for devices in (1, 2):
        job = tmp_path / "runs" / "two" / f"trainer.devices={devices}"
        assert f"on {devices} x cpu" in (job / "output.log").read_text()
        assert json.loads((job / "result.json").read_text())["status"] == "finished"
    ckpt = "ckpt=runs/two/trainer.devices=2"
    ldm("sample", ckpt, "prompt=a red star", "steps=1", "n=1", "out=star.png")
    assert (tmp_path / "star.png").is_file()
    assert "fd_" not in ldm("evaluate", ckpt, "features=none", "count=4", "steps=1")
    printed = run("-c", LOAD, cwd=tmp_path, PYTHONPATH=str(wheel))
    assert f"{wheel / 'ldm' / '__init__.py'} 1 3 64 64" in printed


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_an_empty_folder(wheel, tmp_path, notebook):
    """Its cells as one script, with a training of a few steps."""
    code = "\n".join(read_code_cells(notebook))
    for long, short in BRIEF_NOTEBOOK.items():
        code = code.replace(long, short)
    assert "steps = 4 " in code
    run("-c", code, cwd=tmp_path, PYTHONPATH=str(wheel), MPLBACKEND="agg")
    assert list(tmp_path.glob("runs/**/result.json"))


def test_training_needs_no_package_of_sweeps(tmp_path):
    printed = run("-c", WITHOUT_SWEEP, "--cfg", "job", cwd=tmp_path)
    assert "stage: diffusion" in printed
    for option, package in (
        ("sweeper=optuna", "optuna-sweeper"),
        ("launcher=slurm", "submitit-launcher"),
    ):
        said = run("-c", WITHOUT_SWEEP, "-m", f"hydra/{option}", "seed=1,2", cwd=tmp_path, expect=2)
        assert f"needs a package: pip install hydra-{package}" in said
        assert not list(tmp_path.iterdir())
