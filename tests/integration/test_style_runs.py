"""Style pictures as a user types them: training that begins with a model, painting, refusals."""

import shutil

import pytest
import torch
from PIL import Image, ImageDraw
from shell import FROZEN, ROOT, run, tensors, train

pytestmark = pytest.mark.slow  # each test is processes
BRIEF = ["trainer.val_check_interval=2", "logger=csv", *FROZEN]
STYLE = ["style_encoder=clip", "style_encoder.path=runs/clip", "style_encoder.tiles=2"]
SAMPLE = str(ROOT / "sample.py")
ASK = ["prompt=a red ball", "steps=3", "seed=3"]


@pytest.fixture(scope="module")
def home(prepared, tmp_path_factory):
    """A folder with a model, and one with style that has begun with it."""
    home = tmp_path_factory.mktemp("home") / "home"
    shutil.copytree(prepared, home, symlinks=True)
    train(*BRIEF, "name=model", "trainer.max_steps=2", cwd=home)
    more = ["init=runs/model", "style_encoder.word_dropout=0.5", "style_encoder.style_words=[red]"]
    said = train(*BRIEF, *STYLE, *more, "name=style", "trainer.max_steps=4", cwd=home)
    assert "without effect as yet: style" in said
    for name, fill in (("a", "orange"), ("b", "blue")):
        picture = Image.new("RGB", (24, 16), "navy")
        ImageDraw.Draw(picture).ellipse((4, 4, 15, 11), fill=fill)
        picture.save(home / f"{name}.png")
    return home


def painted(home, *words, ckpt="style"):
    how = ["n=2", "out=out.png", "overwrite=true"]
    run(SAMPLE, f"ckpt=runs/{ckpt}", *ASK, *words, *how, cwd=home)
    return [Image.open(home / f"out_00{i}.png") for i in range(2)]


def test_a_style_picture_changes_what_is_painted(home):
    # So little was learnt in four steps that it takes a large scale to see it.
    apart = ["guidance=style", "guidance.style_scale=2000"]
    ways = ([], ["style=a.png"], ["style=b.png"])
    none, one, other = (painted(home, *apart, *words) for words in ways)
    assert len({picture[0].tobytes() for picture in (none, one, other)}) == 3
    assert one[0].text["style"] == "a.png"
    assert "style" not in none[0].text
    apart.append("style=a.png")
    content = ["image=b.png", "task=img2img", "task.invert=true", "strength=0.6"]
    assert painted(home, *apart, *content)[0].size == (16, 16)


def test_frozen_encoders_are_named_not_stored(home):
    payload = tensors(home / "runs/style")
    assert set(payload["ldm"]["frozen"]) == {"autoencoder", "text_encoder", "style_encoder"}
    assert not any("vision" in name for name in payload["state_dict"])
    assert payload["state_dict"]["ema.module.style.to_emb.weight"].any()


def test_the_same_steps_in_one_go_or_two(home):
    common = [*BRIEF, *STYLE, "style_encoder.recolour=true", "optimizer.decay=constant"]
    train(*common, "name=whole", "trainer.max_steps=4", cwd=home)
    for steps in (2, 4):
        train(*common, "name=halves", f"trainer.max_steps={steps}", cwd=home)
    states = [tensors(home / "runs" / name)["state_dict"] for name in ("whole", "halves")]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


@pytest.mark.parametrize(
    ("words", "ckpt", "message"),
    [
        (["style=a.png"], "model", "was trained without style images"),
        (["style=gone.png"], "style", "gone.png"),
        (["style_encoder=runs/clip"], "model", "trained with none, which is read from nowhere"),
        (["style_encoder=packaged:clip"], "style", "is not the style_encoder that"),
    ],
)
def test_what_cannot_be_is_one_line(home, words, ckpt, message):
    said = run(SAMPLE, f"ckpt=runs/{ckpt}", *ASK, *words, "n=1", cwd=home, expect=2)
    assert message in said
    assert "Traceback" not in said
