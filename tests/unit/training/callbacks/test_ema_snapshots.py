"""Averages that a run keeps for later: the same in a run that was broken off, and safe on disk."""

import resource
from pathlib import Path

import lightning as L
import pytest
import torch
from checkpoint_limits import At, limit_files
from safetensors.torch import save_file
from same_training import assert_same_training
from spoiled_batches import Spoil
from world import latent_diffusion, make_trainer, shapes_data

from ldm.training.callbacks.checkpointing import Checkpoints
from ldm.training.callbacks.ema_snapshots import EMASnapshots
from ldm.training.callbacks.nonfinite import NonFiniteStepSkipper
from ldm.training.fsdp import FullyShardedStrategy
from ldm.training.modules.diffusion import LatentDiffusion
from ldm.utils.ema_files import (
    Snapshot,
    SnapshotError,
    combine_snapshots,
    find_snapshots,
    write_snapshot,
)

LENGTHS = [0.05, 0.1]


def train(
    folder: Path, shapes: Path, text, *callbacks: L.Callback, steps: int, accumulate: int = 1
) -> LatentDiffusion:
    """From last.ckpt where there is one; snapshots of every third step and of the last."""
    module = latent_diffusion(text, phema_lengths=LENGTHS)
    keeper = Checkpoints(folder / "checkpoints", every=4, keep=9, facts={})
    trainer = make_trainer(
        steps=steps,
        callbacks=[*callbacks, EMASnapshots(folder / "phema", every=3), keeper],
        accumulate=accumulate,
    )
    last = folder / "checkpoints" / "last.ckpt"
    trainer.fit(
        module,
        datamodule=shapes_data(shapes),
        ckpt_path=last if last.exists() else None,
        weights_only=True,
    )
    return module


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "phema").iterdir())


def steps(*numbers: int) -> list[str]:
    return [f"step={number:08d}.safetensors" for number in numbers]


def test_a_resumed_run_writes_the_same_snapshots(tmp_path, shapes, tiny_text):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    how = {"accumulate": 2}
    train(whole, shapes, tiny_text, steps=8, **how)
    train(broken, shapes, tiny_text, steps=5, **how)
    assert names(broken) == steps(3, 5)
    # What a try left that went further, and had no checkpoint.
    (broken / "phema" / steps(6)[0]).write_bytes(b"of another run")
    (broken / "phema" / "step=00000003.safetensors.01234567.tmp").write_bytes(b"of a kill")
    module = train(broken, shapes, tiny_text, steps=8, **how)
    assert names(whole) == steps(3, 6, 8)
    assert names(broken) == steps(3, 5, 6, 8)
    for name in names(whole):
        found = [(run / "phema" / name).read_bytes() for run in (whole, broken)]
        assert found[0] == found[1], name
    assert_same_training(*(run / "checkpoints" / "last.ckpt" for run in (whole, broken)))
    kept = find_snapshots(broken / "phema", until=99)
    assert [one[:2] for one in kept[-2:]] == [(0.05, 8), (0.1, 8)]
    for i, track in enumerate(module.phema.tracks):
        state = combine_snapshots(
            kept, [float(one.length == LENGTHS[i]) * (one.step == 8) for one in kept]
        )
        for name, tensor in track.state_dict().items():
            assert torch.equal(state[name], tensor), name
        assert not torch.equal(state["conv_in.weight"], module.denoiser.conv_in.weight)
    assert [one.step for one in find_snapshots(broken / "phema", until=5)] == [3, 3, 5, 5]


def test_snapshots_do_not_change_the_training(tmp_path, shapes, tiny_text):
    kept = train(tmp_path, shapes, tiny_text, steps=4)
    plain = latent_diffusion(tiny_text)
    make_trainer(steps=4).fit(plain, datamodule=shapes_data(shapes))
    assert plain.phema is None
    for name, tensor in plain.state_dict().items():
        assert torch.equal(kept.state_dict()[name], tensor), name


@pytest.mark.filterwarnings("ignore:the loss or the gradient was not finite")
def test_a_step_that_is_left_out_leaves_averages_finite(tmp_path, shapes, tiny_text):
    module = latent_diffusion(tiny_text, phema_lengths=[0.1])
    trainer = make_trainer(steps=4, callbacks=[Spoil(0, 2, gradient=True)])
    skip = NonFiniteStepSkipper(tmp_path / "bad.json", monitor=trainer.callbacks[0], stop_after=3)
    trainer.callbacks.append(skip)
    trainer.fit(module, datamodule=shapes_data(shapes))
    assert skip.skipped == 2
    assert all(value.isfinite().all() for value in module.phema.tracks.parameters())


@pytest.fixture
def unlimited():
    yield lambda: limit_files(resource.RLIM_INFINITY)
    limit_files(resource.RLIM_INFINITY)


def test_snapshots_on_a_full_disk_warn_once(tmp_path, shapes, tiny_text, unlimited, recwarn):
    folder = tmp_path / "phema"
    room = At({2: lambda: limit_files(5_000), 5: unlimited}, wait=False)
    trainer = make_trainer(steps=6, callbacks=[room, EMASnapshots(folder, every=1)])
    module = latent_diffusion(tiny_text, phema_lengths=[0.1])
    trainer.fit(module, datamodule=shapes_data(shapes))
    told = [str(w.message) for w in recwarn if "a snapshot" in str(w.message)]
    said = f"a snapshot cannot be written to {folder} (File too large); the training goes on"
    assert told == [said]
    assert names(tmp_path) == steps(1, 5, 6)


@pytest.fixture
def kept(tmp_path) -> list[Snapshot]:
    """Three averages in two files, with a number that is no weight."""
    draw = torch.Generator().manual_seed(0)
    for step, lengths in ((3, [0.05, 0.1]), (6, [0.05])):
        state = {
            each: {"a.b": torch.randn(4, 5, generator=draw), "n": torch.tensor(step)}
            for each in lengths
        }
        write_snapshot(tmp_path, step, state)
    return find_snapshots(tmp_path, until=6)


def test_averages_are_added_up_in_their_shares(kept):
    seen = []
    parts = [combine_snapshots([one], [1.0])["a.b"] for one in kept]
    total = combine_snapshots(kept, [0.5, -1.5, 2.0], on_progress=lambda: seen.append(1))
    expected = 0.5 * parts[0].double() - 1.5 * parts[1].double() + 2 * parts[2].double()
    assert torch.equal(total["a.b"], expected.float())
    assert total["n"] == 6
    assert len(seen) == 3
    assert total["n"].dtype == torch.int64


def test_averages_of_two_networks_are_not_added(kept, tmp_path):
    write_snapshot(tmp_path, 9, {0.05: {"a.b": torch.zeros(5, 4), "n": torch.tensor(9)}})
    found = find_snapshots(tmp_path, until=9)
    with pytest.raises(SnapshotError, match=r"step=00000009.safetensors is of another network"):
        combine_snapshots(found, [0.25] * 4)


@pytest.mark.parametrize("harm", ["cut", "empty", "other"])
def test_a_damaged_snapshot_is_named(kept, tmp_path, harm):
    path = kept[-1].path
    if harm == "other":
        save_file({"a": torch.zeros(2)}, path)
    else:
        path.write_bytes(path.read_bytes()[: -40 if harm == "cut" else 0])
    with pytest.raises(SnapshotError, match=r"step=00000006.safetensors is no snapshot, .*delete"):
        find_snapshots(tmp_path, until=6)
    assert len(find_snapshots(tmp_path, until=5)) == 2


def test_shards_are_refused(tiny_text):
    with pytest.raises(ValueError, match=r"fsdp keeps no averages .*: take phema.lengths=\[\]"):
        FullyShardedStrategy.check_module(latent_diffusion(tiny_text, phema_lengths=LENGTHS))
    FullyShardedStrategy.check_module(latent_diffusion(tiny_text))
