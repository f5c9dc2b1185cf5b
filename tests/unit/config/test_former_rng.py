"""Which random numbers a run has: those with which it began."""

from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from ldm.config.registry import validate_file_config
from ldm.config.search_path import CONF_DIR
from ldm.config.train_run import check_config_unchanged, keep_former_rng
from ldm.utils.checkpoint_file import CheckpointError, write_checkpoint
from ldm.utils.errors import UsageError


def settings(*words: str) -> DictConfig:
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        return compose("train", overrides=["name=x", *words])


def begun(folder: Path, *, saved: bool = True, without: str = "", **changes: object) -> Path:
    """A run that began with other settings than today's."""
    config = OmegaConf.to_container(settings(), resolve=True) | changes
    config.pop(without, None)
    (folder / "checkpoints").mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if saved:
        (folder / "checkpoints" / "step=00000001.ckpt").touch()
    return folder


def test_a_run_of_before_keeps_torch_and_says_so(tmp_path, capsys):
    run, cfg = begun(tmp_path, without="rng"), settings()
    keep_former_rng(cfg, run)
    check_config_unchanged(cfg, run)
    assert cfg.rng == "torch"
    assert capsys.readouterr().out == f"{run} keeps the random numbers of torch (rng=torch)\n"
    (run / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    again = settings()  # the second time, its settings say rng: torch
    keep_former_rng(again, run)
    check_config_unchanged(again, run)
    assert again.rng == "torch"


def test_a_run_of_before_changes_where_the_user_allows_it(tmp_path, capsys):
    run, cfg = begun(tmp_path, without="rng"), settings("resume.allow=[rng]")
    keep_former_rng(cfg, run)
    check_config_unchanged(cfg, run)
    assert cfg.rng == "philox"
    assert capsys.readouterr().out == ""


def test_a_run_of_before_without_a_checkpoint_begins_anew(tmp_path):
    run, cfg = begun(tmp_path, saved=False, without="rng"), settings()
    keep_former_rng(cfg, run)
    assert cfg.rng == "philox"


def test_a_run_that_lost_its_config_keeps_that_of_its_checkpoint(tmp_path):
    run, cfg = begun(tmp_path, saved=False, rng="torch"), settings()
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").unlink()
    payload = {"ldm": {"config": text}, "state_dict": {}}
    write_checkpoint(payload, run / "checkpoints" / "step=00000001.ckpt")
    keep_former_rng(cfg, run)
    check_config_unchanged(cfg, run)
    assert cfg.rng == "torch"
    with pytest.raises(UsageError, match="seed was 0, is 1"):
        check_config_unchanged(settings("rng=torch", "seed=1"), run)


@pytest.mark.parametrize(
    "words", [("adamw", "adamw8bit"), ("adamw8bit", "adamw"), ("adamw", "muon"), ("muon", "adamw")]
)
def test_moments_of_8_bits_and_of_muon_are_for_their_optimizer_alone(tmp_path, words):
    before, now = (OmegaConf.to_container(settings(f"optimizer={w}").optimizer) for w in words)
    run = begun(tmp_path, optimizer=before)
    cfg = settings("resume.allow=[optimizer]")
    cfg.optimizer = now
    with pytest.raises(UsageError, match=r"neither reads the other's moments: .* init=.* name="):
        check_config_unchanged(cfg, run)


def test_a_run_of_today_keeps_philox(tmp_path, capsys):
    run, cfg = begun(tmp_path), settings()
    keep_former_rng(cfg, run)
    check_config_unchanged(cfg, run)
    assert (cfg.rng, capsys.readouterr().out) == ("philox", "")
    other = settings("rng=torch")
    keep_former_rng(other, run)
    with pytest.raises(UsageError, match="rng was philox, is torch"):
        check_config_unchanged(other, run)


def test_a_run_that_begins_with_torch_says_so(tmp_path, capsys):
    cfg = settings("rng=torch")
    keep_former_rng(cfg, tmp_path)
    assert (
        capsys.readouterr().out
        == f"{tmp_path} begins with the random numbers of torch (rng=torch)\n"
    )


def test_a_checkpoint_says_with_which_numbers_it_samples(tmp_path):
    config = OmegaConf.to_container(settings(), resolve=True)
    for rng, expected in ((config.pop("rng"), "philox"), (None, "torch"), ("torch", "torch")):
        text = yaml.safe_dump(config if rng is None else config | {"rng": rng})
        assert validate_file_config(text, tmp_path, needed=("model",)).rng == expected
    for wrong in ("mersenne", ["philox"], {"_target_": "os.mkdir"}):
        with pytest.raises(CheckpointError, match="rng="):
            validate_file_config(yaml.safe_dump(config | {"rng": wrong}), tmp_path, needed=())
