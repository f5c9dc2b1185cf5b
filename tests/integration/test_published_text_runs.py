"""A denoiser on the text encoders of a published pipeline, as a user types it."""

import shutil

import pytest
from PIL import Image
from pipeline_text import write_sdxl_text
from shell import ROOT, TRAIN, run, tensors

pytestmark = pytest.mark.slow  # each test is processes
SAMPLE = str(ROOT / "sample.py")
BRIEF = [
    *("trainer=cpu", "trainer.max_steps=2", "data.count=8", "data.val_count=8", "data.workers=0"),
    *("data.batch_size=4", "samples.n=2", "samples.steps=1", "eval=none", "logger=csv"),
    *("+model.size_embedding=8", "caption_dropout=0.5"),
]
XL = ["text_encoder=sdxl", "text_encoder.path=xl"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    write_sdxl_text(home / "xl")
    run(TRAIN, *BRIEF, *XL, "name=xl", cwd=home)
    return home


def paint(home, ckpt):
    words = [f"ckpt={ckpt}", "prompt=a red heart", "steps=2", "n=1", "out=out.png"]
    run(SAMPLE, *words, cwd=home)
    return Image.open(home / "out.png").tobytes()


def test_a_network_is_as_wide_as_the_pair(home):
    state = tensors(home / "runs/xl")["state_dict"]
    widths = {name: value.shape[-1] for name, value in state.items() if value.ndim == 2}
    assert widths["denoiser.pooled_mlp.0.weight"] == 20 + 6 * 8
    assert {value for name, value in widths.items() if "attn2.to_k" in name} <= {16 + 24}
    assert all(value.isfinite().all() for value in state.values())


def test_a_bundle_brings_both_encoders(home, tmp_path):
    run("-m", "ldm", "bundle", "ckpt=runs/xl", "out=shared", "license=mit", cwd=home)
    shutil.copytree(home / "shared", tmp_path / "shared")
    assert paint(tmp_path, "shared") == paint(home, "runs/xl")
    parts = {each.name for each in (tmp_path / "shared/text_encoder").iterdir()}
    assert parts == {"text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"}


def test_the_pair_may_move_and_another_one_is_refused(home):
    shutil.copytree(home / "xl", home / "moved")
    words = ("ckpt=runs/xl", "prompt=a red heart", "steps=1", "n=1", "out=moved.png")
    run(SAMPLE, *words, "text_encoder=moved", cwd=home)
    write_sdxl_text(home / "other", seed=9)
    said = run(SAMPLE, *words, "text_encoder=other", cwd=home, expect=2)
    assert "is not the text_encoder that" in said


def test_a_run_goes_on_with_the_pair(home):
    shutil.copytree(home / "runs/xl", home / "runs/more")
    run(TRAIN, *BRIEF, *XL, "name=more", "trainer.max_steps=3", cwd=home)
    assert tensors(home / "runs/more")["global_step"] == 3
    words = ("text_encoder.layer=-3", "trainer.max_steps=4")
    said = run(TRAIN, *BRIEF, *XL, "name=more", *words, cwd=home, expect=2)
    assert "text_encoder.layer was -2, is -3" in said


def test_a_mistake_is_one_line(home):
    cases = {
        "text_encoder.layer=0": "text_encoder.layer=0 must be a whole number from -1024 to -1",
        "text_encoder.layer=-9": "has 3 layers",
        "text_encoder.path=runs/xl": "has no text_encoder_2",
    }
    for word, line in cases.items():
        said = run(TRAIN, *BRIEF, *XL, word, "name=wrong", cwd=home, expect=2)
        assert line in said, said
        assert "Traceback" not in said
