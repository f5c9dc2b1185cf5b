"""Guidance that asks other models, and tasks with pictures, as a user types them."""

import shutil
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image, ImageDraw
from shell import ROOT, run, train

from ldm.config.command_line import quote_override
from ldm.config.composition import CONF_DIR
from ldm.config.pipeline import load_pipeline
from ldm.utils.checkpoint_file import CheckpointError
from ldm.utils.errors import UsageError

pytestmark = pytest.mark.slow  # each test is processes
FEW = ["trainer.max_steps=2", "trainer.val_check_interval=2", "logger=csv"]
FEW += ["autoencoder.path=runs/ae", "text_encoder=clip", "text_encoder.path=runs/clip"]
PROMPTS = ["a red ball", "a blue ball"]


@pytest.fixture(scope="module")
def home(prepared, tmp_path_factory):
    """A folder with a model, an earlier state of it, and one on another schedule."""
    home = tmp_path_factory.mktemp("home") / "home"
    shutil.copytree(prepared, home, symlinks=True)
    train(*FEW, "name=model", "checkpoint.every=1", "checkpoint.keep=9", cwd=home)
    train(*FEW, "name=linear", "scheduler=linear", cwd=home)
    return home


@pytest.fixture
def inside(home, monkeypatch):
    monkeypatch.chdir(home)


def painted(*overrides):
    """Two pictures by a configuration, in this process."""
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        words = [quote_override(word) for word in ("ckpt=x", "device=cpu", *overrides)]
        cfg = compose("sample", overrides=words)
    asked = {"autoencoder": None, "text_encoder": None}
    pipeline = load_pipeline(cfg, "runs/model", asked).pipeline
    return pipeline(PROMPTS, seeds=[0, 1], size=16, steps=3)


@pytest.mark.usefixtures("inside")
def test_a_model_is_its_own_guide_to_nowhere():
    """Away from itself is nowhere; away from an earlier state of it is elsewhere."""
    plain = painted("guidance=none")
    auto = ["guidance=autoguidance", "guidance.scale=3"]
    same = painted(*auto, "guidance.guide=runs/model")
    torch.testing.assert_close(same, plain, rtol=0, atol=1e-5)
    first = min(Path("runs/model/checkpoints").glob("step=*.ckpt"))
    earlier = painted(*auto, f"guidance.guide={first}")
    assert (earlier - plain).abs().max() > 1e-4


@pytest.mark.usefixtures("inside")
def test_a_clip_steers_around_other_guidance():
    inner = ["guidance@guidance.inner=cfg", "guidance.inner.scale=3"]
    cfg = painted("guidance=cfg", "guidance.scale=3")
    off = painted("guidance=clip", *inner, "guidance.scale=0")
    assert torch.equal(off, cfg)
    on = painted("guidance=clip", *inner, "guidance.scale=5", "guidance.reward_model=runs/clip")
    assert (on - cfg).abs().max() > 1e-4


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["guidance=autoguidance"], "guidance.guide is needed: a checkpoint of a worse run"),
        (["guidance=classifier"], "guidance.classifier is needed: a run of stage=classifier"),
        (["guidance=autoguidance", "guidance.guide=typo"], "^guidance.guide='typo' is neither"),
        (["guidance=classifier", "guidance.classifier=typo"], "^guidance.classifier='typo' is nei"),
        (["guidance=autoguidance", "guidance.guide=runs/linear"], "trained on another scheduler"),
        (["guidance=autoguidance", "guidance.guide=runs/clip"], "comes from stage=clip"),
        (["guidance=clip", "guidance@guidance.inner=autoguidance"], "guidance.guide is needed"),
    ],
)
def test_a_guide_that_cannot_guide_is_refused(overrides, message):
    with pytest.raises((UsageError, CheckpointError), match=message):
        painted(*overrides)


def test_pictures_are_edited_filled_in_and_shown_on_the_way(home):
    """The command line of each task; what is kept is kept to the last bit."""
    picture = Image.new("RGB", (24, 16), "navy")
    ImageDraw.Draw(picture).ellipse((8, 4, 15, 11), fill="orange")
    picture.save(home / "in.png")
    mask = Image.new("L", picture.size)
    ImageDraw.Draw(mask).rectangle((12, 0, 23, 15), fill=255)
    mask.save(home / "mask.png")
    common = ["ckpt=runs/model", "prompt=a red ball", "n=1", "image=in.png"]
    sample = str(ROOT / "sample.py")
    fill = ["task=inpaint_projected", "mask=mask.png", "task.rounds=2", "paste=true", "steps=3"]
    run(sample, *common, *fill, "out=fill.png", "previews=5", cwd=home)
    filled, square = Image.open(home / "fill.png"), picture.crop((4, 0, 20, 16))
    assert filled.crop((0, 0, 8, 16)).tobytes() == square.crop((0, 0, 8, 16)).tobytes()
    assert filled.tobytes() != square.tobytes()
    assert filled.text["mask"] == "mask.png"
    assert Image.open(home / "fill_previews.png").size == (3 * 16 + 2 * 2, 16)
    edit = ["task=img2img", "strength=0.5", "task.invert=true", "source=a ball", "steps=2"]
    run(sample, *common, *edit, "out=edit.png", cwd=home)
    assert Image.open(home / "edit.png").size == (16, 16)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task=img2img"], "task=img2img takes an image and no mask: image=FILE"),
        (["image=in.png"], "task=text2img takes no image"),
        (["task=img2img", "image=gone.png"], "gone.png"),
        (["task=inpaint_projected", "image=in.png", "mask=other.png"], "other.png is 5 x 5, but"),
    ],
)
def test_what_a_task_lacks_is_one_line(home, words, message):
    Image.new("RGB", (24, 16)).save(home / "in.png")
    Image.new("L", (5, 5), 255).save(home / "other.png")
    common = ["ckpt=runs/model", "prompt=x", "n=1", "steps=1"]
    said = run(str(ROOT / "sample.py"), *common, *words, cwd=home, expect=2)
    assert message in said
    assert "Traceback" not in said
