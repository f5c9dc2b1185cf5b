"""What cannot be trained is told in one line, before data are drawn and with what would do."""

import pytest
from evaluated_runs import Home
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ldm.config.composition import CONF_DIR
from ldm.config.run import build_diffusion_components, build_job
from ldm.config.suggestions import suggest_overrides
from ldm.utils.errors import UsageError

MOVING = ["data=moving_scenes", "data.count=4", "data.val_count=2", "data.frames=2"]


@pytest.fixture(scope="module")
def home(tiny_clip, tmp_path_factory) -> Home:
    """A folder with a CLIP, and runs with and without style pictures."""
    path = tmp_path_factory.mktemp("home")
    tiny_clip.save(path / "clip")
    home = Home(path)
    few = ["trainer.max_steps=1", "eval=none", "scheduler=sigmoid", "autoencoder.patch=2"]
    home.train("plain", *few)
    home.train("styled", *few, *style(home))
    return home


def style(home: Home) -> list[str]:
    return ["style_encoder=clip", f"style_encoder.path={home.path}/clip", "style_encoder.tiles=2"]


def composed(home: Home, *overrides: str):
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        given = home.options("trainer.max_steps=1", "eval=none", "data.count=9", *overrides)
        return compose("train", overrides=given)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task=img2img"], r"train: leave it out here, then give `python sample.py .*=img2img`"),
        (["task=inpaint_projected"], "is a way of sampling from any run"),
        (["trainer=gpu"], r"accelerator=gpu \(trainer=gpu sets it\): torch finds no GPU"),
        (["trainer.devices=-1"], "devices=-1 means all GPUs, and there is none to use here"),
        (["init=nope"], "init='nope' is neither a run directory nor a file"),
        (["task=superres", "task.scales=[2,3]"], r"of data.size=16 cannot be shrunk 3 times"),
        (["task=video"], "task=video is of videos, .* or data.frames=8$"),
        (["task=video", "eval=scenes"], "or data.frames=8 eval=motion$"),
        (["task=video", "eval=scenes", "data.frames=2"], "take eval=motion, or eval=none"),
        (["data.frames=2"], "task=text2img is of images, and the data are videos: take task="),
        (["task=video", "data.frames=2", "style_encoder=clip"], "takes no style images"),
    ],
)
def test_it_is_told_before_data_are_drawn(home, tmp_path, words, message):
    cfg = composed(home, f"data.folder={tmp_path}/data", *words)
    with pytest.raises(ValueError, match=message):
        build_job(cfg, tmp_path / "run")
    assert not (tmp_path / "data").exists()


def test_data_without_frames_are_told_of_other_data(home):
    data = ["data=coco", "data.size=16"]
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        cfg = compose("train", overrides=home.options("task=video", data=data))
    with pytest.raises(UsageError, match=r"take data=moving_scenes, or data=shards of videos$"):
        build_diffusion_components(cfg, home.path / "runs/new")


def test_another_beginning_is_told_with_what_to_add(home):
    def refusal(ckpt: str, *words: str) -> str:
        cfg = composed(home, f"init={home.path}/runs/{ckpt}", *words)
        with pytest.raises(UsageError) as told:
            build_diffusion_components(cfg, home.path / "runs/new")
        return str(told.value)

    said = refusal("plain", "scheduler=linear", "autoencoder=tiny")
    assert said.endswith(
        "another autoencoder and scheduler: add autoencoder=identity "
        "autoencoder.patch=2 scheduler=sigmoid"
    )
    same = ["scheduler=sigmoid", "autoencoder.patch=2"]
    said = refusal("styled", *same)
    assert said.endswith(f"another style_encoder: add {' '.join(style(home))}")
    for ckpt, words in (("plain", []), ("plain", style(home)), ("styled", style(home))):
        begun = composed(home, f"init={home.path}/runs/{ckpt}", *same, *words)
        assert build_diffusion_components(begun, home.path / "runs/new").denoiser is not None


def test_settings_are_said_as_they_are_typed():
    cfg = OmegaConf.create(
        {"task": {"_target_": "ldm.diffusion.tasks.superres.SuperResolution", "scales": [2, 8]}}
    )
    assert suggest_overrides(cfg, "task") == ["task=superres", "task.scales=[2, 8]"]
    own = OmegaConf.create({"scheduler": {"_target_": "mine.Sine", "power": 2}})
    words = suggest_overrides(own, "scheduler")
    assert words[1:] == ["scheduler._target_=mine.Sine", "+scheduler.power=2"]


def test_videos_are_counted_as_videos(home):
    words = ["task=video", "eval=motion", "trainer.max_steps=1", "data.batch_size=2"]
    job = build_job(composed(home, *MOVING[1:], *words), home.path / "runs/moving")
    assert "on 4 videos (2 for validation): 1 steps of 2 videos on" in job.describe()
