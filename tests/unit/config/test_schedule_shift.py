"""scheduler.shift=auto: the number that a run gets, and what a resumed run keeps."""

import pytest
from omegaconf import OmegaConf

from ldm.config.components import build_components
from ldm.config.python_api import compose
from ldm.config.schedule_shift import resolve_schedule_shift
from ldm.config.train_run import keep_former_shift
from ldm.diffusion.tasks.text_to_image import TextToImage
from ldm.models.autoencoder import IdentityAutoencoder


def settings(shift="auto", **data):
    scheduler = {"shift": shift, "base": 4096}
    return OmegaConf.create({"scheduler": scheduler, "data": {"size": 64, **data}})


def test_the_shift_is_that_of_the_latents(capsys):
    cfg = settings()
    resolve_schedule_shift(cfg, IdentityAutoencoder(patch=2))  # 12 x 32 x 32
    assert cfg.scheduler.shift == pytest.approx(3**0.5)
    assert "scheduler.shift=auto: 1.732, for latents of 12 x 32 x 32" in capsys.readouterr().out


def test_a_number_stays(capsys):
    cfg = settings(3.0)
    resolve_schedule_shift(cfg, IdentityAutoencoder())
    assert cfg.scheduler.shift == 3.0
    assert capsys.readouterr().out == ""


def test_frames_of_a_video_are_counted():
    cfg = settings(frames=4)
    resolve_schedule_shift(cfg, IdentityAutoencoder())
    assert cfg.scheduler.shift == pytest.approx((3 * 4 * 64 * 64 / 4096) ** 0.5)


def test_several_sizes_share_one_number_and_a_line_says_so(capsys):
    cfg = settings(train=[{"path": "a", "size": 32}, {"path": "b", "size": 64}])
    resolve_schedule_shift(cfg, IdentityAutoencoder())
    assert cfg.scheduler.shift == pytest.approx(3**0.5)
    assert "sizes of 32, 64: one number serves all" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "expected"), [("auto", 2.5), (1.0, 1.0)], ids=["auto", "the user's word"]
)
def test_a_resumed_run_keeps_its_shift(given, expected, tmp_path):
    (tmp_path / "config.yaml").write_text("scheduler: {shift: 2.5}")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/step=00000001.ckpt").touch()
    cfg = settings(given)
    keep_former_shift(cfg, tmp_path)
    assert cfg.scheduler.shift == expected


def test_the_schedule_of_a_run_has_the_number():
    words = ["scheduler=flow", "objective=flow", "scheduler.shift=auto", "model.channels=16"]
    cfg = compose("train", [*words, "model.heads=2", "data.size=128"])
    schedule = build_components(cfg, TextToImage()).objective.schedule
    assert cfg.scheduler.shift == schedule.shift == pytest.approx((12 * 16 * 16 / 4096) ** 0.5)
