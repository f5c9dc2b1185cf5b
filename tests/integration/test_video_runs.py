"""Videos as a user types them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from PIL import Image
from shell import ROOT, TRAIN, rows, run, tensors

from ldm.config.command_line import quote_override
from ldm.config.composition import CONF_DIR
from ldm.config.pipeline import load_pipeline
from ldm.utils.errors import UsageError

pytestmark = pytest.mark.slow  # each test is processes
FEW = ["trainer=cpu", "trainer.max_steps=2", "trainer.val_check_interval=2", "logger=csv"]
FEW += ["data.count=6", "data.val_count=3", "data.size=32", "data.batch_size=2"]
FEW += ["data.workers=0", "samples.n=2", "samples.steps=2", "trainer.log_every_n_steps=1"]
SMALL = ["model.channels=16", "model.embedding=32"]
VIDEO = [*FEW, *SMALL, "task=video", "data=moving_scenes", "data.frames=3"]
VIDEO += ["eval.scenes.count=2", "eval.scenes.steps=2"]
PROMPT = "prompt=a small red star left of a big blue circle, flat on navy moving up"


def sample(home, *arguments, expect=0):
    command = [str(ROOT / "sample.py"), PROMPT, "steps=2", *arguments]
    said = run(*command, cwd=home, expect=expect)
    return said if expect else home / said.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model of pictures, and one of videos that began with it."""
    home = tmp_path_factory.mktemp("home")
    run(TRAIN, *FEW, *SMALL, "eval=none", "name=images", cwd=home)
    said = run(TRAIN, *VIDEO, "init=runs/images", "name=video", cwd=home)
    assert "new, and without effect as yet: 13 input channels, temporal" in said
    return home


def test_training_measures_motion_and_leaves_strips(home):
    last = rows(home / "runs/video")[-1]
    assert 0 <= float(last["val/motion_direction"]) <= 1
    assert last["val/loss"]
    with Image.open(home / "runs/video/samples/step=00000002.png") as strips:
        assert strips.size == (3 * 32, 2 * 32 + 2)
    first = tensors(home / "runs/images")["state_dict"]
    for name, tensor in tensors(home / "runs/video")["state_dict"].items():
        if name.startswith("ema.module.") and name in first:  # began there, two steps ago
            assert (tensor[:, : first[name].shape[1]] if tensor.ndim == 4 else tensor).allclose(
                first[name], atol=0.05
            ), name


def test_the_same_command_goes_on(home):
    shutil.copytree(home / "runs/video", home / "runs/more")
    changed = [*VIDEO, "trainer.max_steps=3", "init=runs/images", "name=more"]
    run(TRAIN, *changed, "resume.allow=[name]", cwd=home)
    assert tensors(home / "runs/more")["global_step"] == 3


def test_gif_webp_and_mp4_with_strips_and_facts(home):
    made = sample(home, "ckpt=runs/video", "n=2", "out=made/x.webp", "previews=2")
    assert made == home / "made/x.webp"
    with Image.open(home / "made/x_001.webp") as video:
        assert (video.size, video.n_frames) == ((32, 32), 3)
        assert json.loads(video.getexif()[0x010E])["seed"] == 1
    with Image.open(home / "made/x.png") as strips:  # under their prompt, twice as large
        assert strips.width == 2 * 3 * 32
        assert strips.height > 2 * 2 * 32
    assert (home / "made/x_previews.png").is_file()
    with Image.open(sample(home, "ckpt=runs/video", "n=1", "frames=5", "fps=5")) as video:
        assert (video.format, video.n_frames, video.info["duration"]) == ("GIF", 5, 200)
    pytest.importorskip("av")
    assert b"ftyp" in sample(home, "ckpt=runs/video", "n=1", "out=y.mp4").read_bytes()[:16]


def test_image_to_video_begins_with_the_picture(home):
    picture = np.full((40, 32, 3), 40, np.uint8)
    picture[12:28, 8:24] = (216, 28, 46)
    Image.fromarray(picture).save(home / "first.png")
    made = sample(home, "ckpt=runs/video", "n=1", "image=first.png", "out=i.webp")
    with Image.open(made) as video:
        found = np.asarray(video.convert("RGB"), float)
    assert np.abs(found - picture[4:36]).mean() < 20  # the autoencoder has not seen its like


def test_pictures_and_videos_are_not_confused(home):
    def refused(*arguments):
        return run(TRAIN, *arguments, "name=wrong", cwd=home, expect=2)

    assert "take data=moving_scenes, or data.frames=8" in refused(*FEW, "task=video")
    still = [each for each in VIDEO if not each.startswith("task=")]
    assert "take task=video, or other data" in refused(*still)
    unmeasured = [each for each in VIDEO if not each.startswith("eval.")]
    still = [each for each in unmeasured if not each.startswith("task=")]
    assert "stage=autoencoder is of images" in refused(*still, "stage=autoencoder")
    assert "take eval=motion, or eval=none" in refused(*unmeasured, "eval=fast")
    said = sample(home, "ckpt=runs/images", "task=video", expect=2)
    assert "task=video does not go with" in said
    assert "python train.py task=video init=runs/images" in said
    said = sample(home, "ckpt=runs/video", "task=img2img", "image=first.png", expect=2)
    assert "a network of task=video takes more inputs than noise" in said
    said = sample(home, "cascade=[runs/video,runs/images]", "n=1", expect=2)
    assert "runs/video generates videos" in said
    assert "100%" not in said
    said = sample(home, "ckpt=runs/video", "n=1", "out=x.png", expect=2)
    assert "out=x.png: videos are written as .gif" in said
    said = sample(home, "ckpt=runs/video", "n=1", "image=absent.png", expect=2)
    assert "absent.png" in said
    assert "Traceback" not in said


def painted(home, option, *overrides):
    """A video of three frames under a guidance, in this process."""
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        words = ["ckpt=x", "device=cpu", f"guidance={option}", *overrides]
        cfg = compose("sample", overrides=[quote_override(word) for word in words])
    asked = {"autoencoder": None, "text_encoder": None}
    pipeline = load_pipeline(cfg, str(home / "runs/video"), asked).pipeline
    prompts = ["a red star AND a blue circle :0.5", "a star"]
    return pipeline(prompts, seeds=[0, 1], size=32, steps=2)


def test_every_guidance_guides_videos_or_says_that_it_does_not(home):
    models = {
        "autoguidance": f"guidance.guide={home / 'runs/video'}",
        "classifier": f"guidance.classifier={home / 'runs/images'}",
    }
    options = {path.stem for path in Path(CONF_DIR, "guidance").glob("*.yaml")}
    made = {}
    for option in sorted(options - {"classifier"}):
        made[option] = painted(home, option, *([models[option]] if option in models else []))
        assert made[option].shape == (2, 3, 3, 32, 32), option
        assert made[option].isfinite().all(), option
    for option in ("clip", "compose"):
        assert (made[option] - made["cfg"]).abs().max() > 1e-4, option
    with pytest.raises(UsageError, match="guidance=classifier reads images"):
        painted(home, "classifier", models["classifier"])
    with pytest.raises(UsageError, match="of task=text2img and cannot guide task=video"):
        painted(home, "autoguidance", f"guidance.guide={home / 'runs/images'}")


def test_verbs_of_pictures_refuse_videos_before_they_begin(home):
    before = sorted(home.rglob("*"))
    for verb, words in {
        "evaluate": ["count=8", "steps=1"],
        "augment": ["out=set", "n=2", "steps=1", "template=a star"],
        "explain": ["out=explained", "steps=2"],
    }.items():
        said = run("-m", f"ldm.{verb}", "ckpt=runs/video", "task=video", *words, cwd=home, expect=2)
        assert "generates videos (task=video): give a run of task=text2img" in said
        assert "Traceback" not in said
    assert sorted(home.rglob("*")) == before
