"""W&B without a key and without a network: the files that `wandb sync` would send."""

from pathlib import Path

import pytest
import wandb
from PIL import Image

from ldm.training.wandb_log import has_key, wandb_logger


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # a call would fail at once


def login(file: Path, host: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"machine {host}\n  login user\n  password {'0' * 40}\n")
    file.chmod(0o644)


def log_something(run_dir: Path, *, step: int) -> str:
    """One start of a run; its W&B id."""
    logger = wandb_logger(run_dir=run_dir, name="first")
    try:
        logger.log_metrics({"val/loss": 0.25}, step=step)
        logger.log_image("samples", [Image.new("RGB", (4, 4), "red")], step=step)
        return logger.experiment.id
    finally:
        logger.experiment.finish()
        wandb.teardown()


def test_a_run_without_a_key_is_kept_for_later(tmp_path, capsys):
    run_dir = tmp_path / "run"
    kept = log_something(run_dir, step=3)
    assert f"W&B is offline; `wandb sync {run_dir}/wandb/offline-run-*`" in capsys.readouterr().out
    (offline,) = (run_dir / "wandb").glob("offline-run-*")
    data = (offline / f"run-{kept}.wandb").read_bytes()
    assert b"val/loss" in data
    assert b"0.25" in data
    (picture,) = (offline / "files" / "media" / "images").glob("samples_*.png")
    with Image.open(picture) as image:
        assert image.getpixel((0, 0)) == (255, 0, 0)

    assert log_something(run_dir, step=4) == kept  # the same run goes on
    assert (run_dir / "wandb_id").read_text().strip() == kept


def test_a_key_in_the_environment(monkeypatch):
    assert not has_key()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert has_key()


@pytest.mark.parametrize(
    ("base_url", "host"),
    [
        (None, "api.wandb.ai"),
        ("https://wandb.example.com", "wandb.example.com"),
        ("http://localhost:8080/", "localhost:8080"),
    ],
)
def test_a_key_where_wandb_login_puts_it(monkeypatch, tmp_path, base_url, host):
    monkeypatch.delenv("WANDB_BASE_URL")
    if base_url:
        monkeypatch.setenv("WANDB_BASE_URL", base_url)
    login(tmp_path / "home" / ".netrc", "elsewhere.org")
    assert not has_key()
    login(tmp_path / "home" / ".netrc", host)
    assert has_key()


def test_a_key_in_another_netrc(monkeypatch, tmp_path):
    login(tmp_path / "my" / "keys", "127.0.0.1:9")
    assert not has_key()
    monkeypatch.setenv("NETRC", str(tmp_path / "my" / "keys"))
    assert has_key()


def test_a_broken_netrc_is_no_key(tmp_path):
    login(tmp_path / "home" / ".netrc", "a b c d")
    assert not has_key()
