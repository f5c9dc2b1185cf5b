"""A run that was broken off and resumed is the run that was not: bit for bit."""

from pathlib import Path

import lightning as L
import pytest
import torch
from world import latent_diffusion, make_trainer, shapes_data

from ldm import checkpoint
from ldm.training.checkpoint import Checkpoints


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
) -> L.Trainer:
    """Everything anew, from last.ckpt where there is one, to `steps`."""
    keeper = Checkpoints(folder, every=every, keep=keep, facts={"stage": "diffusion"})
    trainer = make_trainer(steps=steps, callbacks=[keeper], accumulate=accumulate, validate_every=3)
    last = folder / "last.ckpt"
    trainer.fit(
        latent_diffusion(text),
        datamodule=shapes_data(shapes, workers=workers),
        ckpt_path=last if last.exists() else None,
        weights_only=True,
    )
    return trainer


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


@pytest.mark.parametrize(
    ("workers", "accumulate", "broken_at"),
    [
        (0, 1, 4),  # 16 images, in the middle of the second epoch
        (0, 1, 5),  # 20 images, its end
        (0, 2, 4),
        pytest.param(2, 1, 4, marks=pytest.mark.slow),
    ],
)
def test_resumed_is_as_if_never_broken(tmp_path, shapes, tiny_text, workers, accumulate, broken_at):
    how = {"workers": workers, "accumulate": accumulate}
    train(tmp_path / "whole", shapes, tiny_text, steps=8, **how)
    train(tmp_path / "broken", shapes, tiny_text, steps=broken_at, **how)
    train(tmp_path / "broken", shapes, tiny_text, steps=8, **how)
    assert_same_training(tmp_path / "whole" / "last.ckpt", tmp_path / "broken" / "last.ckpt")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_checkpoint_on_the_way_is_as_good_as_one_at_the_end(
    tmp_path, shapes, tiny_text, accumulate
):
    """As after a kill: the file of step 4 was written inside a run of 8 steps."""
    how = {"accumulate": accumulate, "every": 4, "keep": 9}
    train(tmp_path / "whole", shapes, tiny_text, steps=8, **how)
    train(tmp_path / "short", shapes, tiny_text, steps=4, **how)
    middle = tmp_path / "whole" / "step=00000004.ckpt"
    assert_same_training(middle, tmp_path / "short" / "last.ckpt")

    killed = tmp_path / "killed" / "step=00000004.ckpt"
    checkpoint.write(checkpoint.read(middle), killed)
    checkpoint.link_last(killed)
    train(killed.parent, shapes, tiny_text, steps=8, **how)
    assert_same_training(tmp_path / "whole" / "last.ckpt", killed.parent / "last.ckpt")
