"""Models without text, with labels, and classifiers for guidance, as a user types them."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from shell import ROOT, assert_same_learning, rows, run, tensors, train
from world import small_autoencoder

from ldm.config.components import (
    build_frozen_encoders,
    build_objective,
    load_diffusion_checkpoint,
    set_component_location,
)
from ldm.config.guidance import build_noisy_classifier, load_noisy_classifier
from ldm.diffusion.tasks.text_to_image import TextToImage
from ldm.inference.components import Components
from ldm.models.text.labels import LabelTextEncoder, NullTextEncoder
from ldm.utils.checkpoint_file import (
    CheckpointError,
    find_checkpoint,
    read_checkpoint,
    select_prefix,
    write_checkpoint,
)
from ldm.utils.errors import UsageError

pytestmark = pytest.mark.slow  # each test is processes
CPU = torch.device("cpu")
NAMES = ["red", "green", "blue", "yellow", "black", "white", "pink", "gold"]
FEW = ["trainer.max_steps=2", "trainer.val_check_interval=2", "logger=csv"]
FEW += ["autoencoder.path=runs/ae"]
LABELS = ["text_encoder=labels", f"text_encoder.names=[{','.join(NAMES)}]"]
CLIP = ["text_encoder=clip", "text_encoder.path=runs/clip", "text_encoder.pooled=true"]


@pytest.fixture(scope="module")
def home(prepared, tmp_path_factory):
    """A folder with an unconditional and a class-conditional model, and a classifier of labels."""
    home = tmp_path_factory.mktemp("home") / "home"
    shutil.copytree(prepared, home, symlinks=True)
    train(*FEW, "name=none", "text_encoder=none", cwd=home)
    train(*FEW, *LABELS, "name=labels", cwd=home)
    train(*FEW, *LABELS, "name=classes", "stage=classifier", cwd=home)
    return home


def painted(home, *arguments, lines=(), expect=0):
    """The pictures of a command, or what it said."""
    if lines:
        (home / "lines.txt").write_text("\n".join(lines))
        arguments = (*arguments, "prompts=lines.txt")
    said = run(
        str(ROOT / "sample.py"), "steps=2", "n=1", "batch=1", *arguments, cwd=home, expect=expect
    )
    if expect:
        return said
    grid = home / said.strip().splitlines()[-1]
    singles = sorted(grid.parent.glob(f"{grid.stem}_*.png"))
    return [Image.open(path).tobytes() for path in singles]


def test_an_unconditional_model_paints_the_same_whatever_it_is_told(home):
    red, blue = painted(home, "ckpt=runs/none", lines=["a red ball", "no blue ball"])
    assert red == blue
    assert painted(home, "ckpt=runs/none", "guidance=none") == [red]


def test_a_class_conditional_model_knows_its_names(home):
    loud = ["raw=true", "guidance.scale=1e5"]  # it has heard of them in two steps alone
    red, again, blue = painted(home, "ckpt=runs/labels", *loud, lines=["a red ball", "Red", "blue"])
    assert red == again
    assert red != blue
    said = painted(home, "ckpt=runs/labels", "prompt=a gray ball", expect=2)
    assert "the caption 'a gray ball' has none of the 8 names" in said


def test_captions_without_a_name_are_told_before_the_training(home):
    said = train(*FEW, "text_encoder=labels", "name=wrong", cwd=home, expect=2)
    assert "ball' has none of the 6 names of text_encoder=labels" in said


def test_a_classifier_leaves_what_the_plan_says(home):
    run_dir = home / "runs" / "classes"
    result = json.loads((run_dir / "result.json").read_text())
    assert (result["status"], result["steps"]) == ("finished", 2)
    payload = tensors(run_dir)
    assert payload["ldm"]["stage"] == "classifier"
    assert set(payload["ldm"]["frozen"]) == {"autoencoder", "text_encoder"}
    assert {name.split(".")[0] for name in payload["state_dict"]} == {"classifier"}
    last = rows(run_dir)[-1]
    assert all(last[f"val/{key}"] for key in ("loss", "accuracy", "accuracy_t0", "accuracy_t7"))


def test_a_classifier_steers_a_model_without_text(home):
    steer = ["guidance=classifier", "guidance.classifier=runs/classes", "guidance.scale=100"]
    plain = painted(home, "ckpt=runs/none", lines=["red"])[0]
    red, blue = painted(home, "ckpt=runs/none", *steer, lines=["red", "blue"])
    assert len({plain, red, blue}) == 3


@pytest.fixture
def beside(home, monkeypatch) -> Components:
    """What the unconditional model rests on."""
    monkeypatch.chdir(home)
    opened = load_diffusion_checkpoint("runs/none")
    objective, (autoencoder, text) = (
        build_objective(opened.config),
        build_frozen_encoders(opened.config),
    )
    return Components(None, autoencoder, text, None, objective, TextToImage())


def test_a_classifier_comes_back_as_it_was(beside):
    built = load_noisy_classifier("runs/classes", components=beside, device=CPU)
    saved = select_prefix(read_checkpoint(find_checkpoint("runs/classes")), "classifier.")
    assert built.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in built.state_dict().items())
    assert built.text.names == NAMES
    assert not any(weight.requires_grad for weight in built.parameters())
    assert not built.training
    own = LabelTextEncoder(NAMES)
    assert (
        load_noisy_classifier(
            "runs/classes", components=replace(beside, text_encoder=own), device=CPU
        ).text
        is own
    )


def test_a_classifier_of_another_space_is_refused(beside):
    elsewhere = replace(beside, autoencoder=small_autoencoder())
    with pytest.raises(UsageError, match="on the latents of another autoencoder than the model's"):
        load_noisy_classifier("runs/classes", components=elsewhere, device=CPU)
    config = OmegaConf.load("runs/none/config.yaml")
    config.scheduler = {"_target_": "ldm.diffusion.schedules.linear"}
    elsewhere = replace(beside, objective=build_objective(config))
    with pytest.raises(UsageError, match="on another noise schedule than the model"):
        load_noisy_classifier("runs/classes", components=elsewhere, device=CPU)
    with pytest.raises(UsageError, match="comes from stage=autoencoder: a classifier is what"):
        load_noisy_classifier("runs/ae", components=beside, device=CPU)


@pytest.mark.parametrize("in_a_list", [False, True])
def test_a_checkpoint_that_names_other_code_is_refused(beside, tmp_path, in_a_list):
    payload = read_checkpoint(find_checkpoint("runs/classes"))
    config = OmegaConf.create(payload["ldm"]["config"])
    call = {"_target_": "os.mkdir", "path": str(tmp_path / "pwned")}
    config.text_encoder.names = [call] if in_a_list else call
    payload["ldm"]["config"] = OmegaConf.to_yaml(config)
    payload["ldm"]["frozen"]["text_encoder"] = "0"
    write_checkpoint(payload, tmp_path / "bad.ckpt")
    with pytest.raises(CheckpointError, match=r"run: text_encoder\.names "):
        load_noisy_classifier(str(tmp_path / "bad.ckpt"), components=beside, device=CPU)
    assert "pwned" not in os.listdir(tmp_path)


def test_names_that_have_changed_are_told(beside, tmp_path):
    payload = read_checkpoint(find_checkpoint("runs/classes"))
    config = OmegaConf.create(payload["ldm"]["config"])
    (tmp_path / "names.txt").write_text("\n".join(NAMES[::-1]))
    config.text_encoder.names = str(tmp_path / "names.txt")
    payload["ldm"]["config"] = OmegaConf.to_yaml(config)
    write_checkpoint(payload, tmp_path / "moved.ckpt")
    with pytest.raises(CheckpointError, match=r"its weights, or names, differ"):
        load_noisy_classifier(str(tmp_path / "moved.ckpt"), components=beside, device=CPU)
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    found = load_noisy_classifier(str(tmp_path / "moved.ckpt"), components=beside, device=CPU)
    assert found.text.names == NAMES


def test_frozen_parts_that_lie_elsewhere(tmp_path):
    config = OmegaConf.create(
        {
            "a": {"_target_": "x", "path": "runs/old"},
            "b": {"_target_": "x", "names": "old.txt"},
            "c": {"_target_": "ldm.models.text.labels.NullTextEncoder"},
        }
    )
    set_component_location(config, "a", "runs/new")
    set_component_location(config, "b", "new.txt")
    assert (config.a.path, config.b.names) == ("runs/new", "new.txt")
    with pytest.raises(UsageError, match="NullTextEncoder, which is read from nowhere: leave"):
        set_component_location(config, "c", "runs/new")


def test_a_classifier_needs_something_to_compare_with(home, monkeypatch):
    config = OmegaConf.load(home / "runs" / "classes" / "config.yaml")
    with pytest.raises(ValueError, match="take text_encoder=tiny or labels"):
        build_noisy_classifier(
            config, small_autoencoder(), NullTextEncoder(), build_objective(config).schedule
        )


@pytest.mark.parametrize(("kind", "right"), [("labels", "accuracy"), ("scenes", "recall_at_1")])
def test_the_experiments_run(home, kind, right):
    """As they are, but for length, and small pictures."""
    own = ["trainer=cpu", "trainer.log_every_n_steps=1", "data.workers=0", "data.val_count=8"]
    own += ["data.count=20", "data.batch_size=10", "data.size=16"]
    run(str(ROOT / "train.py"), f"experiment=classifier_{kind}", *own, *FEW[:3], cwd=home)
    assert rows(home / "runs" / f"classifier_{kind}")[-1][f"val/{right}"]


@pytest.mark.slow
@pytest.mark.parametrize("text", [LABELS, CLIP], ids=["labels", "captions"])
def test_two_processes_learn_what_one_does(home, text):
    """Same number of steps, each rank with its own samples and noise: else the weights differ."""
    options = [*FEW, *text, "stage=classifier", "trainer.max_steps=3", "optimizer.warmup=1"]
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    names = [f"{text[0].partition('=')[2]}-by-{n}" for n in ("one", "two")]
    for name, more in zip(names, ([], ddp), strict=True):
        train(*options, *more, f"name={name}", cwd=home)
    one, two = (tensors(home / "runs" / name) for name in names)
    assert one["ldm"]["images_seen"] == two["ldm"]["images_seen"] == 12
    assert_same_learning(one, two)
    losses = [[float(row["train/loss"]) for row in rows(home / "runs" / n)[1:]] for n in names]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(set(losses[0])) == 3
