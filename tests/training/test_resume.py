"""A run that was broken off and resumed is the run that was not: bit for bit."""

import multiprocessing
from pathlib import Path

import lightning as L
import pytest
import torch
from world import latent_diffusion, make_trainer, shapes_data

from ldm import checkpoint
from ldm.training.checkpoint import Checkpoints


class Validations(L.Callback):
    """The steps after which there was a validation."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.steps.append(trainer.global_step)


def train(
    folder: Path,
    shapes: Path,
    text,
    *,
    steps: int,
    workers: int = 0,
    accumulate: int = 1,
    every: int = 10**6,
    keep: int = 2,
) -> list[int]:
    """Everything anew, from last.ckpt where there is one, to `steps`; the steps validated."""
    keeper = Checkpoints(folder, every=every, keep=keep, facts={"stage": "diffusion"})
    seen = Validations()
    trainer = make_trainer(
        steps=steps, callbacks=[keeper, seen], accumulate=accumulate, validate_every=3
    )
    last = folder / "last.ckpt"
    trainer.fit(
        latent_diffusion(text),
        datamodule=shapes_data(shapes, workers=workers),
        ckpt_path=last if last.exists() else None,
        weights_only=True,
    )
    return seen.steps


def assert_same(a, b, where: str = "") -> None:
    """Two checkpoints, value for value; tensors bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_training(a: Path, b: Path) -> None:
    a, b = checkpoint.read(a), checkpoint.read(b)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "ldm"):
        assert_same(a[part], b[part], part)


@pytest.fixture(scope="module", params=[1, 2])
def accumulate(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def whole(tmp_path_factory, shapes, tiny_text, accumulate) -> Path:
    """Eight steps without a break, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("whole")
    seen = train(folder, shapes, tiny_text, steps=8, accumulate=accumulate, every=1, keep=99)
    assert seen == [3, 6, 8]
    return folder


@pytest.mark.parametrize(
    ("broken_at", "workers"),
    [
        (4, 2),  # after 16 images, in the middle of the second epoch
        (5, 0),  # after 20 images, at its end
    ],
)
def test_a_run_that_ended_goes_on(
    tmp_path, shapes, tiny_text, whole, accumulate, broken_at, workers
):
    how = {"workers": workers, "accumulate": accumulate}
    train(tmp_path, shapes, tiny_text, steps=broken_at, **how)
    assert_same_training(whole / f"step={broken_at:08d}.ckpt", tmp_path / "last.ckpt")
    assert train(tmp_path, shapes, tiny_text, steps=8, **how) == [6, 8]
    assert_same_training(whole / "last.ckpt", tmp_path / "last.ckpt")


def test_a_run_that_was_killed_goes_on(tmp_path, shapes, tiny_text, whole, accumulate):
    """From a checkpoint that was written on the way, just before a validation: it comes first."""
    left = tmp_path / "step=00000003.ckpt"
    checkpoint.write(checkpoint.read(whole / left.name), left)
    checkpoint.link_last(left)
    assert train(tmp_path, shapes, tiny_text, steps=8, accumulate=accumulate) == [3, 6, 8]
    assert_same_training(whole / "last.ckpt", tmp_path / "last.ckpt")


def test_data_workers_end_with_the_run(tmp_path, shapes, tiny_text):
    train(tmp_path, shapes, tiny_text, steps=1, workers=2)
    assert multiprocessing.active_children() == []


def test_the_newest_are_kept_and_last_is_a_link_to_the_end(tmp_path, shapes, tiny_text):
    train(tmp_path, shapes, tiny_text, steps=5, every=2, keep=2)
    files = ["step=00000004.ckpt", "step=00000005_end.ckpt"]
    manifests = [f"{name}.json" for name in files]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*files, *manifests, "last.ckpt"]
    )
    assert (tmp_path / "last.ckpt").resolve().name == files[1]
    train(tmp_path, shapes, tiny_text, steps=6, every=2, keep=1)
    assert [path.name for path in tmp_path.glob("step=*.ckpt")] == ["step=00000006_end.ckpt"]


def test_torch_opens_a_checkpoint_without_running_anything(tmp_path, shapes, tiny_text):
    train(tmp_path, shapes, tiny_text, steps=1)
    payload = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert payload["ldm"] == {"stage": "diffusion", "images_seen": 4, "validated": True}
    assert payload["global_step"] == 1


def test_a_batch_that_does_not_divide_is_told(shapes, tiny_text):
    trainer = make_trainer(steps=1, accumulate=2)
    data = shapes_data(shapes, batch_size=5)
    with pytest.raises(
        ValueError, match=r"data.batch_size=5 .* must be a multiple of 2 \(1 dev.*, so 4 or 6"
    ):
        trainer.fit(latent_diffusion(tiny_text), datamodule=data)


@pytest.mark.parametrize("wrong", [{"every": 0, "keep": 1}, {"every": 1, "keep": 0}])
def test_saving_never_or_keeping_nothing_is_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="must be 1 or more"):
        Checkpoints(tmp_path, **wrong, facts={})
