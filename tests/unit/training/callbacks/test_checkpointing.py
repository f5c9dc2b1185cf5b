"""Saves that fail, saves in the background, and the best that is kept."""

import json
import resource
from collections.abc import Mapping
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from checkpoint_limits import At, limit_files
from PIL import Image
from safetensors.torch import load_file
from same_training import Validations, assert_same, assert_same_training
from world import latent_diffusion, make_trainer, shapes_data

from ldm.training.callbacks.checkpoint_storage import (
    copy_to_host,
    has_memory_for_copy,
    read_available_memory,
)
from ldm.training.callbacks.checkpointing import Checkpoints
from ldm.training.callbacks.monitoring import SampleImages
from ldm.utils.checkpoint_file import (
    CheckpointError,
    find_newest_checkpoint,
    link_last_checkpoint,
    read_checkpoint,
    select_prefix,
    write_checkpoint,
)

WAYS = pytest.mark.parametrize("background", [False, True], ids=["at once", "in background"])


def train(
    folder: Path,
    shapes: Path,
    text,
    *callbacks: L.Callback,
    steps: int,
    accumulate: int = 1,
    **keeping,
) -> None:
    """From last.ckpt where there is one."""
    keeper = Checkpoints(folder, **{"every": 1, "keep": 2, "facts": {}} | keeping)
    trainer = make_trainer(
        steps=steps, callbacks=[*callbacks, keeper], validate_every=3, accumulate=accumulate
    )
    last = folder / "last.ckpt"
    trainer.fit(
        latent_diffusion(text),
        datamodule=shapes_data(shapes),
        ckpt_path=last if last.exists() else None,
        weights_only=True,
    )


@pytest.fixture
def unlimited():
    yield lambda: limit_files(resource.RLIM_INFINITY)
    limit_files(resource.RLIM_INFINITY)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".json")


@WAYS
def test_a_failed_save_warns_and_the_training_continues(
    tmp_path, shapes, tiny_text, unlimited, background
):
    full = At({3: lambda: limit_files(50_000), 5: unlimited})
    with pytest.warns(UserWarning, match="saving") as told:
        train(tmp_path / "hurt", shapes, tiny_text, full, steps=6, background=background)
    said = [text for text in (str(warning.message) for warning in told) if "MiB" in text]
    assert len(said) == 2  # of steps 3 and 4
    assert said[0].startswith(f"saving {tmp_path / 'hurt'}/step=00000003.ckpt failed (File too ")
    assert " MiB are free. The last good checkpoint is " in said[0]
    assert all(text.endswith("/step=00000002.ckpt; the training goes on") for text in said)
    left = ["last.ckpt", "step=00000006.ckpt", "step=00000006_end.ckpt"]
    assert names(tmp_path / "hurt") == left
    train(tmp_path / "well", shapes, tiny_text, steps=6)
    assert_same_training(tmp_path / "well" / "last.ckpt", tmp_path / "hurt" / "last.ckpt")


@WAYS
@pytest.mark.filterwarnings("ignore:saving .* failed")
def test_the_last_save_must_not_fail(tmp_path, shapes, tiny_text, unlimited, background):
    full = At({3: lambda: limit_files(50_000)})
    with pytest.raises(
        CheckpointError,
        match=r"the run's last checkpoint is missing: saving .*/step=00000003_end.ckpt failed .*"
        r"The last good checkpoint is .*/step=00000002.ckpt$",
    ):
        train(tmp_path, shapes, tiny_text, full, steps=3, background=background)
    unlimited()
    assert names(tmp_path) == ["last.ckpt", "step=00000001.ckpt", "step=00000002.ckpt"]
    train(tmp_path, shapes, tiny_text, steps=3)
    assert find_newest_checkpoint(tmp_path).name == "step=00000003_end.ckpt"


def test_sample_images_on_a_full_disk_warn_once(tmp_path, shapes, tiny_text, unlimited, recwarn):
    pictures = SampleImages(tmp_path / "samples", lambda: (Image.effect_noise((16, 16), 9), {}))
    room = At({3: lambda: limit_files(50), 7: unlimited}, wait=False)
    how = {"steps": 8, "every": 99}
    train(tmp_path / "checkpoints", shapes, tiny_text, room, pictures, **how)
    told = [str(w.message) for w in recwarn if "cannot be written" in str(w.message)]
    path = tmp_path / "samples" / "step=00000003.png"
    assert told == [f"{path} cannot be written (File too large); the training goes on"]
    assert names(path.parent) == ["step=00000008.png"]


def test_background_saves_write_the_same_checkpoints(tmp_path, shapes, tiny_text):
    folders = [tmp_path / str(background) for background in (False, True)]
    for folder in folders:
        train(folder, shapes, tiny_text, steps=7, keep=9, background=folder.name == "True")
    for a, b in zip(*(sorted(folder.glob("step=*.ckpt")) for folder in folders), strict=True):
        assert a.name == b.name
        assert_same(read_checkpoint(a), read_checkpoint(b))
    assert a.name == "step=00000007_end.ckpt"


def test_a_large_state_is_copied_only_where_it_is_small_in_memory():
    gib, cpu = 2**30, {"on_cpu": True, "available": 2**40}
    gpu = {"on_cpu": False, "available": 8 * gib}
    assert has_memory_for_copy(gib // 5, **cpu)
    assert not has_memory_for_copy(gib, **cpu)
    assert has_memory_for_copy(4 * gib, **gpu)
    assert not has_memory_for_copy(5 * gib, **gpu)
    assert 2**20 < read_available_memory() < 2**50


def test_auto_says_by_size_that_a_large_checkpoint_is_not_copied(
    tmp_path, shapes, tiny_text, monkeypatch, capsys
):
    train(tmp_path / "small", shapes, tiny_text, steps=1, background="auto")
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("ldm.training.callbacks.checkpoint_storage.SMALL_COPY", 1000)
    train(tmp_path / "large", shapes, tiny_text, steps=1, background="auto")
    assert capsys.readouterr().out == (
        "a checkpoint of 0.0 GiB is written in the foreground, without a copy: "
        "checkpoint.background=true writes a copy while the training goes on\n"
    )


def test_an_error_waits_for_the_save(tmp_path, shapes, tiny_text):
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(tmp_path, shapes, tiny_text, At({3: fail}, wait=False), steps=6, background=True)
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 2
    assert not list(tmp_path.glob("*.tmp"))


def test_the_state_of_a_callback_that_is_no_plain_value_is_left_out(tmp_path, shapes, tiny_text):
    class Odd(L.Callback):
        def state_dict(self) -> dict:
            return {"odd": np.float64(1)}

        def on_save_checkpoint(self, trainer: L.Trainer, module, checkpoint: dict) -> None:
            checkpoint |= {"mine": {"path": Path()}, "plain": [1, "a", None, torch.ones(2)]}

    with pytest.warns(UserWarning, match=r"Odd holds a numpy\.float64: it is not saved") as found:
        train(tmp_path, shapes, tiny_text, Odd(), steps=6, background=True)
    assert sum("is not saved" in str(each.message) for each in found) == 2, "once for each"
    payload = read_checkpoint(tmp_path / "last.ckpt")
    assert not [name for name in payload["callbacks"] if "Odd" in name]
    assert "mine" not in payload
    assert payload["plain"][:3] == [1, "a", None]


def test_a_payload_that_cannot_be_stored_ends_the_run(tmp_path, shapes, tiny_text):
    class Odd(L.Callback):
        def on_save_checkpoint(self, trainer: L.Trainer, module, checkpoint: dict) -> None:
            checkpoint["loops"]["odd"] = lambda: None

    with pytest.raises(Exception, match="lambda"):
        train(tmp_path, shapes, tiny_text, Odd(), steps=6, background=True)


def test_a_host_copy_does_not_change_later_and_reuses_memory():
    laid_out = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    state = {"a": [laid_out, {"b": torch.arange(3)}], "c": ("x", 1, None)}
    pool = {}
    copy = copy_to_host(state, pool)
    expected = laid_out.clone()
    laid_out.zero_()
    state["a"].append(1)
    assert copy["c"] == ("x", 1, None)
    assert len(copy["a"]) == 2
    assert torch.equal(copy["a"][0], expected)
    assert copy["a"][0].stride() == laid_out.stride()
    again = copy_to_host(state, pool)
    assert again["a"][0].data_ptr() == copy["a"][0].data_ptr()
    assert (again["a"][0] == 0).all()
    state["a"][0] = torch.ones(7)
    assert torch.equal(copy_to_host(state, pool)["a"][0], torch.ones(7))
    module = torch.nn.Linear(2, 2).state_dict()
    assert copy_to_host(module, {})._metadata == module._metadata


class Score(L.Callback):
    """Logs val/score as it is told to."""

    def __init__(self, values: Mapping[int, float]) -> None:
        self.values = values

    def on_validation_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step in self.values:
            module.log("val/score", self.values[trainer.global_step])


BEST = {"metric": "val/score", "direction": "maximize", "keep": 1}


def best(folder: Path) -> str:
    return (folder / "best.ckpt").resolve().name


@WAYS
@pytest.mark.parametrize("every", [3, 4], ids=["saved before", "not saved before"])
def test_the_best_and_the_newest_checkpoints_stay(tmp_path, shapes, tiny_text, background, every):
    def go_on(values: dict[int, float]) -> None:
        how = {**BEST, "keep_best": 1, "every": every, "background": background}
        train(tmp_path, shapes, tiny_text, Score(values), steps=max(values), **how)

    go_on({3: 2.0, 6: 5.0, 9: 1.0, 10: float("nan")})
    links = ["best.ckpt", "last.ckpt"]
    sound = f"step={9 if every == 3 else 8:08d}.ckpt"  # from before what is not a number
    assert names(tmp_path) == [*links, "step=00000006.ckpt", sound, "step=00000010_end.ckpt"]
    assert best(tmp_path) == "step=00000006.ckpt"
    told = {"metric": "val/score", "values": {"step=00000006.ckpt": 5.0}}
    assert read_checkpoint(tmp_path / "last.ckpt")["ldm"]["best"] == told
    go_on({12: 3.0})
    assert names(tmp_path) == [*links, "step=00000006.ckpt", "step=00000012_end.ckpt"]
    (tmp_path / "best.json").unlink()  # the checkpoint knows it as well
    go_on({15: 4.0})
    assert best(tmp_path) == "step=00000006.ckpt"
    go_on({18: 6.0})
    assert names(tmp_path) == [*links, "step=00000018_end.ckpt"]
    assert best(tmp_path) == "step=00000018_end.ckpt"
    assert read_checkpoint(tmp_path / "best.ckpt")["global_step"] == 18


def test_several_of_the_best_are_kept(tmp_path, shapes, tiny_text):
    values = Score({3: 2.0, 6: 5.0, 9: 1.0, 12: 4.0, 13: 0.0})
    train(tmp_path, shapes, tiny_text, values, steps=13, every=99, keep_best=2, **BEST)
    found = json.loads((tmp_path / "best.json").read_text())["values"]
    assert found == {"step=00000006.ckpt": 5.0, "step=00000012.ckpt": 4.0}
    assert names(tmp_path)[2:] == [*found, "step=00000013_end.ckpt"]
    assert best(tmp_path) == "step=00000006.ckpt"


@WAYS
@pytest.mark.filterwarnings("ignore:saving .* failed")
def test_a_best_checkpoint_that_fails_to_save_does_not_replace_the_old_one(
    tmp_path, shapes, tiny_text, unlimited, background
):
    full = At({6: lambda: limit_files(50_000), 8: unlimited})
    values = Score({3: 2.0, 6: 5.0, 8: 1.0})
    how = {**BEST, "keep_best": 1, "every": 7, "background": background}
    train(tmp_path, shapes, tiny_text, full, values, steps=8, **how)
    assert best(tmp_path) == "step=00000003.ckpt"
    assert read_checkpoint(tmp_path / "best.ckpt")["global_step"] == 3


def test_paths_outside_the_folder_in_best_json_are_ignored(tmp_path, shapes, tiny_text):
    """A run may come from anyone: `best.ckpt` beside a name with `..` was somebody's file."""
    mine = tmp_path / "mine" / "best.ckpt"
    mine.parent.mkdir()
    mine.write_text("years of work")
    folder, how = tmp_path / "checkpoints", {**BEST, "keep_best": 2, "every": 99}
    train(folder, shapes, tiny_text, Score({}), steps=2, **how)
    values = {"../mine/best.ckpt": 1e9, str(mine): 1e9, "step=00000002_end.ckpt": 0.5}
    (folder / "best.json").write_text(json.dumps({"metric": "val/score", "values": values}))
    train(folder, shapes, tiny_text, Score({4: 1.0}), steps=4, **how)
    assert mine.read_text() == "years of work"
    assert best(folder) == "step=00000004_end.ckpt"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_resumed_from_its_best_equals_an_uninterrupted_one(
    tmp_path, shapes, tiny_text, accumulate
):
    """Which was saved at the end of a validation, unlike the others."""
    how = {"every": 99, "keep_best": 9, "accumulate": accumulate}
    whole, other = tmp_path / "whole", tmp_path / "other"
    train(whole, shapes, tiny_text, Score({}), steps=8, **how)
    first = whole / "step=00000003.ckpt"
    write_checkpoint(read_checkpoint(first), other / first.name)
    link_last_checkpoint(other / first.name)
    seen = Validations()
    train(other, shapes, tiny_text, seen, steps=8, **how)
    assert seen.steps == [6, 8]
    assert_same_training(whole / "last.ckpt", other / "last.ckpt")


def test_each_save_exports_the_average_on_demand(tmp_path, shapes, tiny_text):
    facts = {"stage": "diffusion", "config": "a: 1\n"}
    folder = tmp_path / "checkpoints"
    how = {"keep": 1, "weights": True, "background": True, "facts": facts}
    train(folder, shapes, tiny_text, steps=2, **how)
    exported = sorted(path.name for path in (tmp_path / "weights").glob("*.safetensors"))
    assert exported == [f"step=0000000{i}.safetensors" for i in ("1", "2", "2_end")]
    weights = load_file(tmp_path / "weights" / exported[-1])
    average = select_prefix(read_checkpoint(folder / "last.ckpt"), "ema.module.")
    assert weights.keys() == average.keys()
    assert all(torch.equal(weights[name], average[name]) for name in average)
    said = json.loads((tmp_path / "weights" / "step=00000002_end.json").read_text())
    made = {"step": 2, "images_seen": 8, "validated": True, "finite": True, "even_crops": True}
    made |= {"fast_pixels": True}
    assert said.items() >= {**made, **facts}.items()  # and what the data say of their order


def test_an_unknown_direction_is_refused(tmp_path):
    with pytest.raises(ValueError, match="direction=up is neither minimize nor maximize"):
        Checkpoints(tmp_path, every=1, keep=1, facts={}, direction="up")


def test_a_checkpoint_of_another_network_names_both_shapes(tmp_path, shapes, tiny_text):
    train(tmp_path, shapes, tiny_text, steps=1)
    other = latent_diffusion(tiny_text)
    other.denoiser.conv_in = torch.nn.Conv2d(3, 32, 3, padding=1)
    with pytest.raises(RuntimeError, match=r"conv_in.weight: .*\[16, 3, 3, 3\].*\[32, 3, 3, 3\]"):
        make_trainer(steps=2).fit(
            other,
            datamodule=shapes_data(shapes),
            ckpt_path=tmp_path / "last.ckpt",
            weights_only=True,
        )
