"""The EMA length that is chosen after training: measured, drawn, stored, sampled."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from evaluated_runs import COLOURS, Home, measure
from hydra import compose, initialize_config_dir
from PIL import Image
from safetensors.torch import load_file
from shell import ROOT, run

from ldm.cli.phema import PHEMA_TEXT_OPTIONS, synthesize_ema
from ldm.config.composition import CONF_DIR
from ldm.experiments.curves import read_curves
from ldm.training.power_ema import EMAProfile, solve_mixture
from ldm.utils.checkpoint_file import (
    find_newest_checkpoint,
    read_checkpoint,
    select_prefix,
    write_checkpoint,
)
from ldm.utils.errors import UsageError

STEPS, EVERY = 9, 2
LENGTHS = [0.05, 0.1]


@pytest.fixture(scope="module")
def home(tiny_clip, tmp_path_factory) -> Home:
    """A folder with a run that kept two averages, and one that kept none."""
    path = tmp_path_factory.mktemp("home")
    tiny_clip.save(path / "clip")
    home = Home(path)
    brief = [f"trainer.max_steps={STEPS}", "trainer.val_check_interval=99", "eval=none"]
    brief += ["optimizer.warmup=1"]
    home.train("kept", *brief, f"phema.lengths={LENGTHS}", f"phema.every={EVERY}")
    home.train("none", *brief, "trainer.max_steps=1")
    return home


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def kept(home, tmp_path) -> Path:
    """A copy of the run, to write to."""
    return shutil.copytree(home.path / "runs" / "kept", tmp_path / "runs" / "kept", symlinks=True)


def choose(*overrides: str, **given: str | Path) -> None:
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        cfg = compose("phema", overrides=["steps=2", "device=cpu", "count=8", *COLOURS, *overrides])
    asked = {name: cfg[name] for name in PHEMA_TEXT_OPTIONS}
    synthesize_ema(cfg, asked | {name: str(value) for name, value in given.items()})


def weights(ckpt: Path, place: str = "ema.module.") -> dict[str, torch.Tensor]:
    return select_prefix(read_checkpoint(ckpt), place)


def test_snapshots_lie_in_the_run(kept):
    found = sorted(path.stem for path in (kept / "phema").iterdir())
    assert found == [f"step={step:08d}" for step in (2, 4, 6, 8, 9)]


def test_a_kept_length_is_had_back(kept):
    for i, length in enumerate(LENGTHS):
        choose(f"length={length}", ckpt=kept)
        ours = weights(kept / "checkpoints" / "phema.ckpt")
        stored = weights(kept / "checkpoints" / "last.ckpt", f"phema.tracks.{i}.")
        assert ours.keys() == stored.keys()
        for name, tensor in stored.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-8)


def test_a_length_that_nobody_kept_is_a_sum_of_snapshots(kept, tmp_path, capsys):
    out = tmp_path / "elsewhere" / "mine.ckpt"
    choose("length=0.2", ckpt=kept, out=out)
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    at = [EMAProfile(length, step) for step in (2, 4, 6, 8, 9) for length in LENGTHS]
    made = solve_mixture(at, EMAProfile(0.2, STEPS))
    payload = read_checkpoint(out)
    facts = {"length": 0.2, "step": STEPS, "snapshots": 10, "misfit": made.misfit}
    assert payload["ldm"]["phema"] == facts
    assert payload["global_step"] == STEPS
    assert (
        payload["ldm"]["config"]
        == read_checkpoint(kept / "checkpoints" / "last.ckpt")["ldm"]["config"]
    )
    averages = []
    for _, step in at[::2]:
        file = load_file(kept / "phema" / f"step={step:08d}.safetensors")
        averages += [file[f"{length}/conv_in.weight"].double() for length in LENGTHS]
    expected = sum(share * average for share, average in zip(made.shares, averages, strict=True))
    for place in ("ema.module.", "denoiser."):
        assert torch.equal(weights(out, place)["conv_in.weight"], expected.float())
    own = weights(kept / "checkpoints" / "last.ckpt")
    assert not torch.equal(own["conv_in.weight"], expected.float())


def test_a_length_out_of_reach_is_told(kept, capsys):
    choose("length=0.01", ckpt=kept)
    said = capsys.readouterr().out
    assert "length=0.01 is approximate: " in said
    assert "off its profile by " in said
    choose("length=0.1", ckpt=kept)
    assert "approximate" not in capsys.readouterr().out


def test_lengths_are_measured_drawn_and_the_best_is_stored(kept, capsys):
    choose(ckpt=kept, lengths="0.2,0.05,0.1", metric="val/fd_colours")
    said = capsys.readouterr().out
    points = json.loads((kept / "curve_length.json").read_text())
    assert [point["varied"]["length"] for point in points] == ["0.05", "0.1", "0.2"]
    values = [point["metrics"]["fd_colours"] for point in points]
    assert len(set(values)) == 3
    best = points[values.index(min(values))]["varied"]["length"]
    assert f"best: length={best}, fd_colours {min(values):.4g}" in said
    with (kept / "curve_length.csv").open() as file:
        assert [row["length"] for row in csv.DictReader(file)] == ["0.05", "0.1", "0.2"]
    assert Image.open(kept / "curve_length.png").width > 600
    assert read_curves(kept) == {"curve_length": points}
    ckpt = kept / "checkpoints" / "phema.ckpt"
    facts = read_checkpoint(ckpt)["ldm"]["phema"]
    assert (facts["length"], facts["metric"]) == (float(best), "fd_colours")
    # The run goes on from its own, and both are what ldm.evaluate says.
    assert find_newest_checkpoint(kept / "checkpoints").name == "step=00000009_end.ckpt"
    chosen = next(point for point in points if point["varied"]["length"] == best)
    assert measure(ckpt=ckpt)["metrics"] == chosen["metrics"]
    own = measure(ckpt=kept)["metrics"]
    assert all(point["own"] == own for point in points)
    assert own != chosen["metrics"]
    assert not [*(kept / "eval").glob("pieces-*")]


def test_scenes_decide_where_there_are_any(kept, capsys):
    choose("features=none", "count=2", ckpt=kept, lengths="[0.1]")
    said = capsys.readouterr().out
    assert "best: length=0.1, scene_accuracy " in said
    assert "last of those tried" not in said
    assert "scene_shape" in json.loads((kept / "curve_length.json").read_text())[0]["metrics"]


def test_an_earlier_checkpoint_is_averaged_up_to_its_step(home, kept):
    payload = read_checkpoint(kept / "checkpoints" / "last.ckpt")
    write_checkpoint({**payload, "global_step": 7}, kept / "checkpoints" / "step=00000007.ckpt")
    choose("length=0.1", ckpt=kept / "checkpoints" / "step=00000007.ckpt")
    facts = read_checkpoint(kept / "checkpoints" / "phema.ckpt")["ldm"]["phema"]
    assert (facts["step"], facts["snapshots"]) == (6, 6)


def test_mistakes_are_told_before_anything_is_painted(home, kept):
    with pytest.raises(
        UsageError,
        match=r"no snapshots .* a run saves them that starts with, say, phema.lengths='\[0.05",
    ):
        choose(ckpt=home.path / "runs" / "none")
    with pytest.raises(UsageError, match=r"lengths=a,0.1: each must be a number above 0 and up"):
        choose(ckpt=kept, lengths="a,0.1")
    with pytest.raises(UsageError, match=r"lengths=0.1,0.5: each must be"):
        choose(ckpt=kept, lengths="0.1,0.5")
    for out in ("step=00000099.ckpt", "last.ckpt", "best.ckpt", "mine.pt"):
        with pytest.raises(UsageError, match=r"another name that ends in \.ckpt"):
            choose("length=0.1", ckpt=kept, out=kept / "checkpoints" / out)
    choose("length=0.1", ckpt=kept)
    with pytest.raises(UsageError, match=r"phema.ckpt is such an average already"):
        choose("length=0.1", ckpt=kept / "checkpoints" / "phema.ckpt")


def test_a_metric_that_is_not_measured_is_told(kept):
    with pytest.raises(UsageError, match=r"metric=fd_colour is not measured - did you mean fd_col"):
        choose(ckpt=kept, lengths="0.1", metric="fd_colour")


def test_the_command_line(home, kept):
    cwd = kept.parent.parent
    shutil.copytree(home.path / "data", cwd / "data")
    brief = ["steps=1", "count=2", "features=none", "device=cpu", "metric=val/scene_color"]
    said = run("-m", "ldm.phema", "ckpt=runs/kept", "lengths=0.05", *brief, cwd=cwd)
    assert "best: length=0.05, scene_color 0" in said
    last = said.splitlines()[-1]
    assert last.endswith("  runs/kept/curve_length.png  runs/kept/checkpoints/phema.ckpt"), said


@pytest.mark.slow
def test_it_is_sampled_like_any_checkpoint(kept):
    cwd = kept.parent.parent
    run("-m", "ldm.phema", "ckpt=runs/kept", "length=0.07", cwd=cwd)
    paint = ["ckpt=runs/kept/checkpoints/phema.ckpt", "prompt=a red heart", "n=1", "steps=1"]
    picture = run(str(ROOT / "sample.py"), *paint, cwd=cwd).strip().splitlines()[-1]
    assert Image.open(cwd / picture).text["ckpt"].endswith("phema.ckpt")
