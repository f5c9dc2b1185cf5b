"""A run that was broken off and resumed is the run that was not: bit for bit."""

import multiprocessing
import os
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from same_training import Validations, assert_same_training
from world import SIZE, latent_diffusion, make_trainer, shape, shapes_data, write_shapes

from ldm.data.datamodule import TextImageData
from ldm.data.shards.index import open_index
from ldm.data.shards.reader import write_shard
from ldm.data.shards.tar_headers import ShardError
from ldm.training.callbacks.checkpointing import Checkpoints
from ldm.utils.checkpoint_file import link_last_checkpoint, read_checkpoint, write_checkpoint


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
    val_batch_size: int = 64,
    seen: Validations | None = None,
) -> list[int]:
    """Everything anew, from last.ckpt where there is one, to `steps`; the steps validated."""
    keeper = Checkpoints(folder, every=every, keep=keep, facts={"stage": "diffusion"})
    seen = seen or Validations()
    trainer = make_trainer(
        steps=steps, callbacks=[keeper, seen], accumulate=accumulate, validate_every=3
    )
    last = folder / "last.ckpt"
    trainer.fit(
        latent_diffusion(text),
        datamodule=shapes_data(shapes, workers=workers, val_batch_size=val_batch_size),
        ckpt_path=last if last.exists() else None,
        weights_only=True,
    )
    return seen.steps


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
def test_a_finished_run_continues_with_more_steps(
    tmp_path, shapes, tiny_text, whole, accumulate, broken_at, workers
):
    how = {"workers": workers, "accumulate": accumulate}
    train(tmp_path, shapes, tiny_text, steps=broken_at, **how)
    assert_same_training(whole / f"step={broken_at:08d}.ckpt", tmp_path / "last.ckpt")
    assert train(tmp_path, shapes, tiny_text, steps=8, **how) == [6, 8]
    assert_same_training(whole / "last.ckpt", tmp_path / "last.ckpt")


def test_a_killed_run_resumes(tmp_path, shapes, tiny_text, whole, accumulate):
    """From a checkpoint that was written on the way, just before a validation: it comes first."""
    left = tmp_path / "step=00000003.ckpt"
    write_checkpoint(read_checkpoint(whole / left.name), left)
    link_last_checkpoint(left)
    assert train(tmp_path, shapes, tiny_text, steps=8, accumulate=accumulate) == [3, 6, 8]
    assert_same_training(whole / "last.ckpt", tmp_path / "last.ckpt")


def test_a_validation_after_a_resume_uses_all_its_batches(tmp_path, shapes, tiny_text):
    how = {"steps": 7, "every": 1, "keep": 9, "val_batch_size": 3}
    whole, late = Validations(), Validations()
    train(tmp_path / "whole", shapes, tiny_text, **how, seen=whole)
    left = tmp_path / "killed" / "step=00000006.ckpt"  # the second validation comes after it
    write_checkpoint(read_checkpoint(tmp_path / "whole" / left.name), left)
    link_last_checkpoint(left)
    train(tmp_path / "killed", shapes, tiny_text, **how, seen=late)
    assert whole.losses.keys() == {3, 6, 7}
    assert late.losses == {step: whole.losses[step] for step in (6, 7)}


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 1)])
def test_a_run_may_resume_with_another_accumulation(tmp_path, shapes, tiny_text, before, after):
    """No step is cut short, none is left out, and validations stay where they were."""
    assert train(tmp_path, shapes, tiny_text, steps=5, accumulate=before) == [3, 5]
    assert train(tmp_path, shapes, tiny_text, steps=8, accumulate=after) == [6, 8]
    payload = read_checkpoint(tmp_path / "last.ckpt")
    assert (payload["global_step"], payload["ldm"]["images_seen"]) == (8, 32)


@pytest.mark.filterwarnings("ignore:.*skipped, the next sample")
def test_the_count_of_skipped_samples_continues(tmp_path, tiny_text):
    members = [{"png": shape(n) if n % 3 else b"none", "txt": b"a red circle"} for n in range(10)]
    write_shard(tmp_path / "0.tar", ((f"{n}", sample) for n, sample in enumerate(members)))
    folder, counts = str(tmp_path / "0.tar"), {}
    for name, ends in (("whole", [9]), ("broken", [4, 9])):
        for end in ends:
            keeper = Checkpoints(tmp_path / name, every=99, keep=1, facts={})
            trainer = make_trainer(steps=end, callbacks=[keeper])
            trainer.callbacks[0].every = 3  # so that the break is between two logging steps
            how = {"on_error": "skip", "max_skipped": 1.0, "workers": 0, "size": SIZE}
            data = TextImageData(train=folder, val=folder, batch_size=4, **how)
            last = tmp_path / name / "last.ckpt"
            resume = {"ckpt_path": last if last.exists() else None, "weights_only": True}
            trainer.fit(latent_diffusion(tiny_text), datamodule=data, **resume)
            counts[name, end] = trainer.callbacks[0].latest["data/skipped"]
    assert counts["whole", 9] == counts["broken", 9] > counts["broken", 4] > 0


def test_a_resumed_run_keeps_its_crops_and_its_resize(tmp_path, shapes, tiny_text):
    def fit(steps: int) -> bool:
        keeper = Checkpoints(tmp_path, every=99, keep=1, facts={})
        how = {"size": SIZE, "batch_size": 4, "workers": 0}
        data = TextImageData(train=str(shapes), val=str(shapes), **how)
        last = tmp_path / "last.ckpt"
        resume = {"ckpt_path": last if last.exists() else None, "weights_only": True}
        trainer = make_trainer(steps=steps, callbacks=[keeper])
        trainer.fit(latent_diffusion(tiny_text), datamodule=data, **resume)
        rules = {"even_crops": data.train_set.even_crops, "fast_pixels": data.val_set.fast_pixels}
        assert rules.items() <= read_checkpoint(last)["ldm"].items()
        assert data.train_set.fast_pixels == data.val_set.fast_pixels == data.train_set.even_crops
        assert not data.train_set.without_augmentation().fast_pixels
        return data.train_set.even_crops

    assert fit(1)
    assert fit(2)
    last = (tmp_path / "last.ckpt").resolve()
    payload = read_checkpoint(last)
    del payload["ldm"]["even_crops"], payload["ldm"]["fast_pixels"]  # as those of before
    write_checkpoint(payload, last)
    assert not fit(3)
    assert not fit(4)


class Cut(L.Callback):
    """Cuts a file off after a step."""

    def __init__(self, path: Path, *, after: int) -> None:
        self.path = path
        self.after = after

    def on_train_batch_end(self, trainer: L.Trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.after:
            os.truncate(self.path, 600)


def test_a_validation_whose_data_is_lost_is_repeated(tmp_path, shapes, tiny_text):
    hurt = write_shapes(tmp_path / "val", range(4), range(4, 10))
    good = tmp_path / "good.tar"
    shutil.copy2(hurt / "00001.tar", good)

    def fit(folder: Path, *callbacks: L.Callback) -> dict[int, float]:
        seen, keeper = Validations(), Checkpoints(folder, every=3, keep=2, facts={})
        how = {"size": SIZE, "batch_size": 4, "val_batch_size": 3, "workers": 0}
        last = folder / "last.ckpt"
        make_trainer(
            steps=8, callbacks=[keeper, seen, *callbacks], accumulate=2, validate_every=3
        ).fit(
            latent_diffusion(tiny_text),
            datamodule=TextImageData(train=str(shapes), val=str(hurt), **how),
            ckpt_path=last if last.exists() else None,
            weights_only=True,
        )
        return seen.losses

    whole = fit(tmp_path / "whole")
    with pytest.raises(ShardError, match=r"00001.tar changed since it was indexed; restart"):
        fit(tmp_path / "broken", Cut(hurt / "00001.tar", after=5))
    assert read_checkpoint(tmp_path / "broken" / "last.ckpt")["global_step"] == 6
    shutil.copy2(good, hurt / "00001.tar")
    assert fit(tmp_path / "broken") == {step: whole[step] for step in (6, 8)}
    assert_same_training(tmp_path / "whole" / "last.ckpt", tmp_path / "broken" / "last.ckpt")


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
    facts = {
        "stage": "diffusion",
        "images_seen": 4,
        "validated": True,
        "finite": True,
        "even_crops": True,
        "fast_pixels": True,
        "sizes": False,
        "source": open_index(shapes).fingerprint,
        "cached": False,
    }
    assert payload["ldm"] == facts
    assert payload["global_step"] == 1


def test_a_batch_size_that_does_not_divide_is_refused(shapes, tiny_text):
    trainer = make_trainer(steps=1, accumulate=2)
    data = shapes_data(shapes, batch_size=5)
    with pytest.raises(
        ValueError, match=r"data.batch_size=5 .* must be a multiple of 2 \(1 dev.*, so 4 or 6"
    ):
        trainer.fit(latent_diffusion(tiny_text), datamodule=data)
