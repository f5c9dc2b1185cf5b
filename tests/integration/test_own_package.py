"""A team's own package, outside of this repository: trained, resumed, swept, sampled, measured."""

import csv
import json
from pathlib import Path

import pytest
from shell import ROOT, TRAIN, run
from team import CONF, GROUPS, OUTSIDE, SMALL, TEAM, install

pytestmark = pytest.mark.slow  # each test is processes
SAMPLE = str(ROOT / "sample.py")
FOLDER = {"PYTHONPATH": f"{ROOT}:{OUTSIDE}"}
FEW = [*SMALL, "eval=none", "validate_first=false", "samples.n=0", "trainer.max_steps=1"]
TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
# What is needed to read the run, with words that end in an error where it is read.
READERS = {
    "sample": [SAMPLE, "ckpt=runs/team", "prompt=a red circle", "steps=2", "n=1", "out=a.png"],
    "evaluate": ["-m", "ldm.evaluate", "ckpt=runs/team", "count=8", "steps=1", "out=e.json"],
    "phema": ["-m", "ldm.phema", "ckpt=runs/team", "lengths=0.1,0.2", "count=8", "steps=1"],
    "augment": ["-m", "ldm.augment", "ckpt=runs/team", "n=2", "steps=1", "out=more", "clip=none"],
    "explain": ["-m", "ldm.explain", "ckpt=runs/team", "steps=2"],
    "bundle": ["-m", "ldm.bundle", "ckpt=runs/team", "out=untrusted"],
    "init": [TRAIN, *FEW, *TEAM, "init=runs/team", "name=more"],
    "cascade": [SAMPLE, "cascade=[runs/ours,runs/team]", "prompt=a red circle", "steps=2"],
    "guide": [
        *(SAMPLE, "ckpt=runs/ours", "prompt=a red circle", "steps=2"),
        *("guidance=autoguidance", "guidance.guide=runs/team"),
    ],
}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[str, str]:
    return {"PYTHONPATH": install(tmp_path_factory.mktemp("site"))}


@pytest.fixture(scope="module")
def home(tmp_path_factory, site) -> Path:
    """A folder with a run of the installed package's components, and one of ours."""
    home = tmp_path_factory.mktemp("home")
    words = [
        *SMALL,
        *TEAM,
        "features=team",
        "eval=fast",
        "eval.images.count=8",
        "eval.images.steps=1",
    ]
    words += ["trainer.max_steps=2", "phema.lengths=[0.1,0.2]", "phema.every=1", "name=team"]
    said = run(TRAIN, *words, cwd=home, **site)
    assert "note: this run uses components of teampackage: commands that read it need" in said
    run(TRAIN, *FEW, "name=ours", cwd=home)
    return home


def targets(home: Path, name: str) -> str:
    return (home / "runs" / name / "config.yaml").read_text()


def test_each_kind_of_component_is_trained_and_measured(home):
    assert targets(home, "team").count("_target_: teampackage.") == len(GROUPS)
    with (home / "runs" / "team" / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["val/fd_team"]) > 0


def test_the_same_command_resumes_without_trust(home, site):
    words = [*SMALL, *TEAM, "eval=none", "name=resumed"]
    run(TRAIN, *words, "trainer.max_steps=1", cwd=home, **site)
    said = run(TRAIN, *words, "trainer.max_steps=2", cwd=home, **site)
    assert "runs/resumed resumes" in said
    assert json.loads((home / "runs/resumed/result.json").read_text())["steps"] == 2


@pytest.mark.parametrize("reader", READERS)
def test_a_command_without_trust_refuses_the_run_and_imports_nothing(home, site, reader, tmp_path):
    marker = tmp_path / "imported"
    own = [word for word in READERS[reader] if not word.endswith("=team")]
    said = run(*own, cwd=home, expect=2, TEAM_MARKER=str(marker), **site)
    assert "add trust=[teampackage] if you trust that package" in said
    assert "'teampackage." in said
    assert not marker.exists()


@pytest.mark.parametrize("reader", ["sample", "evaluate", "phema", "augment", "init"])
def test_a_command_with_trust_reads_the_run(home, site, reader):
    run(*READERS[reader], "trust=[teampackage]", cwd=home, **site)


def test_a_bundle_of_the_run_is_sampled_where_the_package_is_trusted(home, site):
    words = ["-m", "ldm.bundle", "ckpt=runs/team", "out=shared", "trust=teampackage"]
    run(*words, cwd=home, **site)
    card = (home / "shared" / "README.md").read_text()
    assert "ckpt=shared trust=[teampackage]" in card
    assert 'ldm.load("shared", trust=["teampackage"])' in card
    sample = [SAMPLE, "ckpt=shared", "prompt=a red circle", "n=1", "steps=2", "out=s.png"]
    assert "add trust=[teampackage]" in run(*sample, cwd=home, expect=2, **site)
    run(*sample, "trust=[teampackage]", cwd=home, **site)


def test_one_line_of_the_users_configuration_file_is_trust_as_well(home, site, tmp_path):
    (tmp_path / "ldm").mkdir()
    (tmp_path / "ldm" / "config.yaml").write_text("trust: [teampackage]\n")
    run(*READERS["sample"][:-1], "out=b.png", cwd=home, XDG_CONFIG_HOME=str(tmp_path), **site)


def test_options_of_a_folder_reach_the_jobs_of_a_sweep(home):
    (home / "options").symlink_to(CONF)
    own = ["model=team", "autoencoder=team", "text_encoder=team", "name=sweep"]
    sweep = [TRAIN, "-m", *FEW, *own, "scheduler=team,cosine", "--config-dir", "options"]
    run(*sweep, cwd=home, **FOLDER)
    assert "teampackage.diffusion.SineSchedule" in targets(home, "sweep/scheduler=team")


@pytest.mark.parametrize("way", ["searchpath", "installed"])
def test_options_reach_every_rank(home, site, way):
    words = [*FEW, *TEAM, *TWO, f"name={way}"]
    if way == "installed":
        run(TRAIN, *words, cwd=home, **site)
    else:
        run(TRAIN, *words, f"hydra.searchpath=[file://{CONF}]", cwd=home, **FOLDER)
    assert json.loads((home / "runs" / way / "result.json").read_text())["status"] == "finished"


def test_a_class_on_the_command_line_needs_no_file(home):
    own = ["scheduler._target_=teampackage.diffusion.SineSchedule", "+scheduler.power=2"]
    own += ["sampler._target_=teampackage.diffusion.PlainEulerSampler"]  # ddim has null settings
    small = ["model=nano", "model.channels=16", "autoencoder=identity", "name=typed"]
    said = run(TRAIN, *FEW, *own, *small, cwd=home, **FOLDER)
    assert "SineSchedule takes no scheduler.steps, scheduler.offset" in said
    assert "PlainEulerSampler takes no sampler.eta, sampler.offset" in said
    assert "sampler.ends, sampler.clip, sampler.quantile" in said
    assert "power: 2" in targets(home, "typed")
    sample = [SAMPLE, "ckpt=runs/typed", "prompt=a red circle", "n=1", "steps=2", "out=t.png"]
    run(*sample, "trust=teampackage", cwd=home, **FOLDER)
