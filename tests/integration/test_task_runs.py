"""Networks with more inputs than noise, from training to images, as a user types it."""

import json
import shutil

import pytest
from hydra import compose, initialize_config_dir
from PIL import Image
from shell import ROOT, run, train

from ldm.config.command_line import quote_override
from ldm.config.composition import CONF_DIR
from ldm.config.pipeline import load_cascade
from ldm.diffusion.guidance.cfg import ClassifierFreeGuidance
from ldm.diffusion.guidance.compositional import CompositionalGuidance

pytestmark = pytest.mark.slow  # each test is processes
FEW = ["trainer.max_steps=2", "trainer.val_check_interval=2", "logger=csv"]
FEW += ["autoencoder.path=runs/ae", "text_encoder=clip", "text_encoder.path=runs/clip"]
SAMPLE = str(ROOT / "sample.py")
ONE = ["prompt=a red ball", "n=1", "steps=2"]


@pytest.fixture(scope="module")
def home(prepared, tmp_path_factory):
    """A folder with a model, and two that went on from it."""
    home = tmp_path_factory.mktemp("home") / "home"
    shutil.copytree(prepared, home, symlinks=True)
    train(*FEW, "name=model", cwd=home)
    for task in ("inpaint", "superres"):
        said = train(*FEW, f"task={task}", "init=runs/model", f"name={task}", cwd=home)
        assert "new, and without effect as yet" in said
        assert list((home / "runs" / task / "samples").glob("step=*.png"))
    return home


@pytest.fixture
def photo(home):
    picture = Image.new("RGB", (24, 16), "navy")
    picture.paste("orange", (8, 4, 15, 11))
    picture.save(home / "in.png")
    mask = Image.new("LA", picture.size)
    mask.paste((255, 255), (12, 0, 24, 16))
    mask.save(home / "mask.png")
    return picture


def test_a_hole_is_filled_and_a_picture_continued(home, photo):
    run(SAMPLE, "ckpt=runs/inpaint", *ONE, "image=in.png", "mask=mask.png", "out=a.png", cwd=home)
    assert Image.open(home / "a.png").size == (16, 16)
    outer = ["image=in.png", "pad=[8,0,8,16]", "paste=true", "out=b.png"]
    run(SAMPLE, "ckpt=runs/inpaint", *ONE, *outer, cwd=home)
    wider = Image.open(home / "b.png")
    assert wider.size == (16 + 16, 16 + 16)
    assert wider.getpixel((15, 7))[0] > wider.getpixel((15, 7))[2], "the orange of the middle"
    assert wider.text["pad"] == "[8, 0, 8, 16]"


def test_a_picture_of_any_shape_is_enlarged(home, photo):
    run(SAMPLE, "ckpt=runs/superres", *ONE, "image=in.png", "out=c.png", cwd=home)
    assert Image.open(home / "c.png").size == (48, 32)
    four = ["task=superres", "task.scale=4", "image=in.png", "out=d.png"]
    run(SAMPLE, "ckpt=runs/superres", *ONE, *four, cwd=home)
    assert Image.open(home / "d.png").size == (96, 64)


def test_a_cascade_is_one_command(home):
    run(SAMPLE, "cascade=[runs/model,runs/superres]", *ONE, "n=2", "out=e.png", cwd=home)
    assert Image.open(home / "e_000.png").size == (32, 32)
    facts = Image.open(home / "e_001.png").text
    assert facts["cascade"] == '["runs/model", "runs/superres"]'
    assert json.loads(facts["guidance"])["scale"] == 2, "the base's"
    (later,) = json.loads(facts["enlarged"])
    assert later["guidance"]["scale"] == 1
    assert "runs/model" in facts["ckpt"]
    assert "runs/superres" in later["ckpt"]


def test_later_stages_of_a_cascade_read_the_parts_of_a_prompt(home, monkeypatch):
    """Where the first stage does, also inside another guidance; else all words as they are."""
    monkeypatch.chdir(home)
    asked = dict.fromkeys(("autoencoder", "text_encoder"))
    for words, kind in {
        ("guidance=compose",): CompositionalGuidance,
        (
            "guidance=clip",
            "guidance@guidance.inner=compose",
            "guidance.reward_model=runs/clip",
        ): CompositionalGuidance,
        ("guidance=cfg",): ClassifierFreeGuidance,
    }.items():
        with initialize_config_dir(CONF_DIR, version_base="1.3"):
            words = ["ckpt=x", "device=cpu", "cascade_guidance_scale=1.5", *words]
            cfg = compose("sample", overrides=[quote_override(word) for word in words])
        _, later = load_cascade(cfg, ["runs/model", "runs/superres"], asked)
        assert later.pipeline.guidance == kind(scale=1.5)


def test_verbs_that_begin_with_words_refuse_networks_that_begin_with_a_picture(home):
    for verb, words in {
        "evaluate": ["ckpt=runs/inpaint", "task=inpaint", "count=8", "steps=1"],
        "augment": ["ckpt=runs/model", "task=img2img", "out=set", "n=1", "template=a ball"],
    }.items():
        said = run("-m", f"ldm.{verb}", *words, cwd=home, expect=2)
        assert f"{words[1]} starts from an image: take task=text2img" in said
        assert not (home / "set").exists()


def test_img2img_changes_a_part_where_no_strength_is_given(home, photo):
    words = ["ckpt=runs/model", "task=img2img", "image=in.png"]
    run(SAMPLE, *words, *ONE, "out=s/", cwd=home)
    assert Image.open(home / "s/a-red-ball_000.png").text["strength"] == "0.7"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["ckpt=runs/model", "task=inpaint", "image=in.png", "mask=mask.png"],
            "python train.py task=inpaint init=runs/model",
        ),
        (
            ["ckpt=runs/inpaint", "task=text2img"],
            "more inputs than noise. Give a run of task=text2img",
        ),
        (["ckpt=runs/inpaint", "task=superres", "image=in.png"], "not trained with small images"),
        (["ckpt=runs/inpaint"], "task=inpaint takes an image and a mask"),
        (["ckpt=runs/inpaint", "image=in.png", "pad=[9,0,9,0]", "size=16"], "leave -2 x 16 pixels"),
        (["ckpt=runs/inpaint", "image=in.png", "pad=[1,2]"], "of 4 values, each a whole number"),
        (["ckpt=runs/inpaint", "pad=[4,4,4,4]"], "is for an image: image=FILE"),
        (["ckpt=runs/superres", "image=in.png", "size=64"], "neither mask nor pad nor size"),
        (["ckpt=runs/model", "frames=3"], "frames=3 is for videos"),
        (["ckpt=runs/model", "device=gpu"], "device=gpu is not here"),
        (["ckpt=runs/model", "out=in.png/x.png"], "in.png is a file, not a folder"),
        (["cascade=[runs/model,runs/gone]"], "runs/gone"),
        (["ckpt=runs/superres", "image=in.png", "mask=mask.png"], "neither mask nor pad"),
        (["cascade=[runs/model,runs/inpaint]"], "and enlarges nothing"),
        ([], "ckpt is needed"),
    ],
)
def test_what_does_not_go_together_is_one_line(home, photo, words, message):
    said = run(SAMPLE, *ONE, *words, cwd=home, expect=2)
    assert message in said
    assert "Traceback" not in said
    assert "100%" not in said, "nothing was painted before"


def test_a_run_that_is_no_beginning_is_refused(home):
    for words, message in (
        (["init=runs/model", "scheduler=linear"], "was trained with another scheduler"),
        (["init=runs/model", "model.channels=32"], "is no smaller network of this kind"),
        (["init=runs/clip"], "comes from stage=clip"),
        (["init=runs/gone"], "neither a run directory nor a file"),
    ):
        assert message in train(*FEW, *words, "name=x", cwd=home, expect=2)


def test_a_run_goes_on_without_what_it_began_from(home):
    words = [*FEW, "task=inpaint", "name=later"]
    shutil.copytree(home / "runs/model", home / "runs/first")
    train(*words, "init=runs/first", cwd=home)
    shutil.rmtree(home / "runs/first")
    words[0] = "trainer.max_steps=4"
    assert "resumes" in train(*words, "init=runs/first", cwd=home)
