"""Runs and checkpoints of before the move to ten rooms resume, sample and load.

tests/helpers/former/ was written by commit b39dbae: runs.tar.xz holds a tiny run of each stage
after two steps, resumed.json what two more steps measured there, components.yaml every component
that a configuration could name.
"""

import csv
import json
import tarfile
from pathlib import Path

import pytest
import yaml
from shell import ROOT, run

from ldm.config.registry import validate_component
from ldm.experiments.former_names import FORMER_SETTINGS, update_names, update_override
from ldm.experiments.run_dir import change_concerns

FORMER = ROOT / "tests" / "helpers" / "former"
SHORT = "data=scenes data.count=16 data.val_count=4 data.batch_size=4 data.workers=0 data.size=16 "
SHORT += "trainer=cpu trainer.max_steps=4 trainer.val_check_interval=2 logger=csv eval=none "
SHORT += "trainer.log_every_n_steps=1 samples.n=2 samples.steps=2"
UNET = "model.channels=4 model.heads=2 model.groups=2 model.embedding=8 model.waves=2 "
UNET += "model.multipliers=[1] model.attention=[true]"
CODER = "autoencoder.channels=4 autoencoder.latent_channels=4 autoencoder.multipliers=[1]"
PIXELS = "autoencoder=identity autoencoder.patch=4"
CLIP = "text_encoder=clip text_encoder.path=runs/clip style_encoder=clip"
TOWER = "classifier.channels=4 classifier.width=8 classifier.heads=2 classifier.groups=2 "
TOWER += "classifier.waves=2 classifier.multipliers=[1] classifier.attention=[true]"
COMMANDS = {
    "autoencoder": f"stage=autoencoder autoencoder.path=null {CODER}",
    "clip": "stage=clip vocab_size=514 clip.width=8 clip.heads=2 clip.layers=1 clip.projection=8",
    "diffusion": f"text_encoder=labels {PIXELS} {UNET} weighting=min_snr "
    "time_sampler=logit_normal loss=huber",
    "classifier": f"experiment=classifier_labels {PIXELS} {TOWER}",
    "style": f"autoencoder.path=runs/autoencoder {CODER} {CLIP} style_encoder.path=runs/clip "
    f"{UNET} task=inpaint",
    "video": f"task=video data=moving_scenes data.frames=2 text_encoder=none {PIXELS} {UNET}",
}


@pytest.fixture
def former(tmp_path) -> Path:
    with tarfile.open(FORMER / "runs.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_of_before_resumes_a_former_run(name, former):
    said = run(str(ROOT / "train.py"), *f"{SHORT} {COMMANDS[name]} name={name}".split(), cwd=former)
    assert f"runs/{name} resumes" in said
    assert f"runs/{name} keeps the random numbers of torch" in said
    if "waves" in COMMANDS[name]:
        assert "waves is called" in said
    with (former / "runs" / name / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if float(row["step"]) > 2]
    expected = json.loads((FORMER / "resumed.json").read_text())[name]
    for row, before in zip(rows, expected, strict=True):
        for key, value in before.items():
            assert float(row[key]) == pytest.approx(value, rel=1e-4), (key, row["step"])


@pytest.mark.slow
def test_a_former_run_samples(former):
    words = ["ckpt=runs/diffusion", "prompt=circle", "steps=2", "n=1", "sampler=lcm"]
    said = run(str(ROOT / "sample.py"), *words, "sampler.origin=50", "out=a.png", cwd=former)
    assert "note: the setting sampler.origin is called sampler.original_steps now" in said
    assert (former / "a.png").is_file()


def former_components():
    options = yaml.safe_load((FORMER / "components.yaml").read_text())
    return [(group, option, node) for group in options for option, node in options[group].items()]


@pytest.mark.parametrize(
    ("group", "option", "node"),
    former_components(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_component_of_before_is_admitted(group, option, node):
    """Interpolations are what a run's configuration holds as plain values."""
    plain = {key: value for key, value in node.items() if "${" not in str(value)}
    [(group, node)] = update_names({group: plain}).items()
    if node:  # style_encoder=none is empty
        assert validate_component(node, group)["_target_"].startswith("ldm.")


def test_a_former_setting_in_a_file_of_the_user_is_named(tmp_path):
    """And a setting of a class of the user's own keeps its name, whatever it is."""
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\nmodel:\n  waves: 3\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    words = [str(ROOT / "train.py"), f"--config-dir={tmp_path}", "experiment=mine"]
    message = "the setting model.waves is called model.positional_waves now"
    assert message in run(*words, cwd=tmp_path, expect=2)
    (tmp_path / "mine.py").write_text("class Net:\n    pass\n")
    words = ["model._target_=mine.Net", "+model.waves=2", "--cfg=job"]
    said = run(str(ROOT / "train.py"), *words, cwd=tmp_path, PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert "  waves: 2" in said
    [note] = [line for line in said.splitlines() if "note:" in line]
    assert note.startswith("note: mine.Net takes no model.channels, ")
    assert "waves" not in note.replace("positional_waves", "")


def test_former_settings_keep_what_is_around_them():
    assert update_override("+task.given=0.5") == "+task.first_frame_prob=0.5"
    assert update_override("time_sampler.power=2") == "timestep_sampler.power=2"
    assert update_override("name=time_sampler") == "name=time_sampler"
    assert update_override("time_sampler=a,b") == "timestep_sampler=a,b"
    assert update_override("time_sampler@time_sampler=a") == "timestep_sampler@timestep_sampler=a"
    swept = "hydra.sweeper.params.model"
    assert (
        update_override(f"+{swept}.waves=choice(1,2)") == f"+{swept}.positional_waves=choice(1,2)"
    )
    own = {"model": {"_target_": "mine.Net", "waves": 2}, "classifier": {"waves": 2}}
    assert update_names(own) == {"model": own["model"], "classifier": {"positional_waves": 2}}
    for both in ({"waves": 2, "positional_waves": 3}, {"positional_waves": 3, "waves": 2}):
        assert update_names({"model": both}) == {"model": {"positional_waves": 3}}
    assert not set(FORMER_SETTINGS) & set(FORMER_SETTINGS.values())


def test_resume_allow_takes_former_settings():
    change = "model.positional_waves was 2, is 3"
    assert change_concerns(change, ["model.waves"])
    assert change_concerns(change, ["model"])
    assert not change_concerns(change, ["model.positional", "classifier.waves"])
    assert change_concerns("timestep_sampler.power was 2, is 3", ["time_sampler"])
