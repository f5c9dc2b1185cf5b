"""Losses and gradients that are not finite: the step is left out, on all ranks, and told."""

import json
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from same_training import assert_same
from shell import ROOT, run
from signalled_runs import RUN as TINY
from spoiled_batches import Spoil
from world import latent_diffusion, make_trainer, shapes_data

from ldm.experiments.run_dir import read_metrics
from ldm.training.callbacks.checkpointing import Checkpoints
from ldm.training.callbacks.nonfinite import NonFiniteStepSkipper, NotFiniteError
from ldm.training.ema import lerp_by_tensor
from ldm.training.loggers.csv import CsvLog
from ldm.training.modules.diffusion import LatentDiffusion
from ldm.utils.checkpoint_file import parse_checkpoint_step, read_checkpoint
from ldm.utils.hashing import hash_module


class Omits(LatentDiffusion):
    """Does not take the step with a certain number, counted from 1."""

    omitted = 0

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        if self.trainer.global_step + 1 == self.omitted:
            optimizer_closure()
            return
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


def train(
    folder: Path,
    shapes: Path,
    module,
    *callbacks,
    steps: int,
    accumulate: int = 1,
    every: int = 1,
    stop_after: int = 3,
    clip: float = 1.0,
    keep: int = 9,
    validate_every: int | None = None,
    logger: type[CsvLog] = CsvLog,
) -> NonFiniteStepSkipper:
    trainer = make_trainer(steps=steps, callbacks=[], accumulate=accumulate, clip=clip)
    [meter] = trainer.callbacks[:1]
    meter.every = every
    skip = NonFiniteStepSkipper(folder / "bad_batches.json", monitor=meter, stop_after=stop_after)
    keeper = Checkpoints(folder / "checkpoints", every=2, keep=keep, facts={}, skipper=skip)
    trainer.callbacks += [*callbacks, skip, keeper]
    trainer.val_check_interval = validate_every or trainer.val_check_interval
    trainer.loggers = [logger(folder / "metrics.csv")]
    last = folder / "checkpoints" / "last.ckpt"
    how = {"ckpt_path": last if last.exists() else None, "weights_only": True}
    trainer.fit(module, datamodule=shapes_data(shapes), **how)
    return skip


@pytest.mark.filterwarnings("ignore:the loss or the gradient was not finite")
@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
@pytest.mark.parametrize(("accumulate", "batch"), [(1, 0), (1, 3), (2, 4), (2, 5)])
@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_skipped_step_equals_a_run_without_that_update(
    tmp_path, shapes, tiny_text, accumulate, batch, gradient, clip
):
    if clip == 0.0 and accumulate == 2:
        pytest.skip("nothing new")
    step = batch // accumulate + 1
    how = {"steps": 6, "accumulate": accumulate, "clip": clip}
    spoil = Spoil(batch, gradient=gradient)
    skip = train(tmp_path / "a", shapes, latent_diffusion(tiny_text), spoil, **how)
    assert skip.skipped == 1
    module = latent_diffusion(tiny_text)
    module.__class__ = Omits
    module.omitted = step
    assert train(tmp_path / "b", shapes, module, **how).skipped == 0
    one, other = (
        read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("a", "b")
    )
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "ldm"):
        assert_same(one[part], other[part], part)
    [told] = json.loads((tmp_path / "a" / "bad_batches.json").read_text())
    assert told["step"] == step
    assert not (tmp_path / "b" / "bad_batches.json").exists()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("clip", [0.01, 1e6])
def test_clipping_by_the_known_norm_changes_no_bit(tmp_path, shapes, tiny_text, clip, precision):
    how = {"steps": 3, "clip": clip, "precision": precision}
    lightnings, ours = (latent_diffusion(tiny_text) for _ in range(2))
    make_trainer(**how).fit(lightnings, datamodule=shapes_data(shapes))
    trainer = make_trainer(**how)
    monitor = trainer.callbacks[0]
    trainer.callbacks.append(
        NonFiniteStepSkipper(tmp_path / "bad.json", monitor=monitor, stop_after=3)
    )
    trainer.fit(ours, datamodule=shapes_data(shapes))
    assert hash_module(ours) == hash_module(lightnings)


@pytest.mark.filterwarnings("ignore:the loss or the gradient was not finite")
def test_an_unfused_optimizer_skips_the_step_too(tmp_path, shapes, tiny_text):
    module = latent_diffusion(tiny_text)
    module.make_optimizer = lambda parameters, steps: torch.optim.SGD(parameters, 0.01, 0.9)
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, *args) -> None:
            nets = module.denoiser, module.ema.module
            seen.append([hash_module(net) for net in nets])

    assert train(tmp_path, shapes, module, Spoil(1), Watch(), steps=3).skipped == 1
    assert seen[0] == seen[1]
    assert seen[1][0] != seen[2][0]
    assert seen[1][1] != seen[2][1]


@pytest.mark.filterwarnings("ignore:the loss or the gradient was not finite")
def test_a_skipped_step_alerts_the_owner(tmp_path, shapes, tiny_text):
    class AlertLog(CsvLog):
        def alert(self, title: str, text: str) -> None:
            alerts.append((title, text.partition(":")[0]))

    alerts = []
    train(tmp_path, shapes, latent_diffusion(tiny_text), Spoil(1), steps=3, logger=AlertLog)
    text = "the loss or the gradient was not finite at step 2"
    assert alerts == [("steps that are not finite", text)]


@pytest.mark.parametrize("every", [1, 4])
def test_too_many_skipped_steps_in_a_row_stop_the_run_and_list_the_samples(
    tmp_path, shapes, tiny_text, every
):
    spoil = Spoil(1, 3, 4, 5, 6, 7)  # steps 2 and 4 to 8
    with pytest.warns(UserWarning, match=r"was not finite at step 2(, 4)?: left out"):  # noqa: SIM117
        with pytest.raises(
            NotFiniteError,
            match=r"was not finite at step .*6: left out. .*bad_batches.json names the samples. "
            r"3 in a row are too many .* good checkpoint is .*/step=00000002.ckpt",
        ):
            train(tmp_path, shapes, latent_diffusion(tiny_text), spoil, steps=20, every=every)
    told = json.loads((tmp_path / "bad_batches.json").read_text())
    assert [bad["step"] for bad in told] == [4, 5, 6]
    for bad in told:
        [batch] = bad["batches"]
        first = 4 * (bad["step"] - 1)
        assert batch["positions"] == list(range(first, first + 4))
        assert batch["loss"] == "nan"
        assert batch["rank"] == 0
        assert batch["keys"] == spoil.keys[bad["step"] - 1]
    state = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.filterwarnings("ignore:the loss or the gradient was not finite")
def test_the_count_is_logged_and_goes_on_with_the_run(tmp_path, shapes, tiny_text):
    train(tmp_path, shapes, latent_diffusion(tiny_text), Spoil(0, 2), steps=4, every=3)
    logged = [row["train/skipped_steps"] for row in read_metrics(tmp_path)]
    assert logged == [2, 2]  # at step 3, and at 4 before its validation
    skip = train(tmp_path, shapes, latent_diffusion(tiny_text), Spoil(0), steps=6, every=3)
    assert skip.skipped == 3
    assert read_metrics(tmp_path)[-1]["train/skipped_steps"] == 3


def test_on_a_device_the_average_moves_by_what_the_device_says():
    averages, weights = ([torch.randn(n, 2) for n in range(1, 40)] for _ in range(2))
    before = [average.clone() for average in averages]
    lerp_by_tensor(averages, weights, 0.25 * (1 - torch.tensor(1.0)))
    assert_same(averages, before)
    lerp_by_tensor(averages, weights, 0.25 * (1 - torch.tensor(0.0)))
    for now, then, weight in zip(averages, before, weights, strict=True):
        torch.testing.assert_close(now, then.lerp(weight, 0.25))


class SpoilWeights(L.Callback):
    """Puts a NaN into a weight after a certain step, as a decay of nan would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, module: LatentDiffusion, *args) -> None:
        if trainer.global_step == self.step:
            module.denoiser.conv_in.bias.data[0] = torch.nan


def steps_in(folder: Path) -> list[int]:
    return sorted(
        parse_checkpoint_step(path) for path in (folder / "checkpoints").glob("step=*.ckpt")
    )


@pytest.mark.filterwarnings("ignore:the loss or the gradient was not finite")
def test_saves_during_skipped_steps_delete_no_older_checkpoint(tmp_path, shapes, tiny_text):
    how = {"keep": 2, "every": 1}
    spoil = Spoil(*range(6, 11))  # steps 7 to 11
    with pytest.raises(NotFiniteError, match=r"good checkpoint is .*/step=00000006.ckpt"):
        train(tmp_path, shapes, latent_diffusion(tiny_text), spoil, steps=20, stop_after=5, **how)
    assert steps_in(tmp_path) == [4, 6, 10]
    facts = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["ldm"]
    assert facts["finite"] is True
    assert facts["doubtful_from"] == 7
    with pytest.raises(NotFiniteError, match=r"good checkpoint is .*/step=00000006.ckpt"):
        train(
            tmp_path, shapes, latent_diffusion(tiny_text), Spoil(0), steps=20, stop_after=5, **how
        )
    train(tmp_path, shapes, latent_diffusion(tiny_text), steps=14, stop_after=5, **how)
    assert steps_in(tmp_path) == [14, 14], "it goes on, and the row is over"


def test_weights_that_are_not_finite_are_not_saved(tmp_path, shapes, tiny_text):
    with pytest.raises(
        NotFiniteError,
        match=r"the weights are not finite after step 6, and not saved. The last good checkpoint "
        r"is .*/step=00000004.ckpt; take a lower",
    ):
        train(tmp_path, shapes, latent_diffusion(tiny_text), SpoilWeights(6), steps=20)
    assert steps_in(tmp_path) == [2, 4]


@pytest.mark.filterwarnings("ignore:the loss or the gradient was not finite")
def test_a_non_finite_validation_keeps_older_checkpoints(tmp_path, shapes, tiny_text):
    class Ruin(L.Callback):
        """Finite weights, with which no loss is."""

        def on_train_batch_end(self, trainer, module: LatentDiffusion, *args) -> None:
            if trainer.global_step == 5:
                for network in (module.denoiser, module.ema.module):
                    network.conv_in.weight.data.fill_(1e38)

    how = {"keep": 1, "steps": 12, "stop_after": 99, "validate_every": 4}
    train(tmp_path, shapes, latent_diffusion(tiny_text), Ruin(), **how)
    assert steps_in(tmp_path) == [4, 12]
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["ldm"]["doubtful_from"] == 5


@pytest.mark.slow
def test_a_run_that_ends_with_non_finite_weights_fails(tmp_path):
    ruin = [*TINY, "name=ruin", "optimizer.lr=1e6", "trainer.max_steps=2", "data.workers=0"]
    for _ in range(2):  # the same command again has nothing left to train, and says the same
        said = run(str(ROOT / "train.py"), *ruin, cwd=tmp_path, expect=1)
        result = json.loads((tmp_path / "runs" / "ruin" / "result.json").read_text())
        assert result["status"] == "failed"
        assert "the last validation's val/loss is nan. The last good checkpoint is" in said
        assert result["error"].startswith("NotFiniteError: the last validation's val/loss is nan")


RANKS = """
import sys, torch, json
import lightning as L
from world import latent_diffusion, shapes_data, SafeCheckpointIO, ThroughputMonitor
from ldm.utils import checkpoint_file as checkpoint
from ldm.models.text.clip import ClipTextEncoder
from ldm.training.callbacks.checkpointing import Checkpoints
from ldm.training.fsdp import FullyShardedStrategy
from ldm.training.callbacks.nonfinite import NonFiniteStepSkipper

class Spoil(L.Callback):
    def on_train_batch_start(self, trainer, module, batch, i):
        if trainer.global_rank == 1 and trainer.global_step in BAD:
            batch["images"][0, 0, 0, 0] = torch.nan

class Watch(L.Callback):
    seen = []
    def on_train_batch_end(self, trainer, module, *args):
        state = trainer.strategy.lightning_module_state_dict()
        if trainer.is_global_zero:
            self.seen.append({name: value.clone() for name, value in state.items()})

BAD, stop_after = json.loads(sys.argv[4]), int(sys.argv[5])
quiet = {f"enable_{what}": False for what in ("checkpointing", "model_summary", "progress_bar")}
monitor, watch = ThroughputMonitor(every=1), Watch()
skip = NonFiniteStepSkipper(checkpoint.Path("bad.json"), monitor=monitor, stop_after=stop_after)
how = {"every": 1, "keep": 9, "background": True, "skipper": skip}
keeper = Checkpoints(checkpoint.Path("checkpoints"), **how, facts={})
trainer = L.Trainer(
    accelerator="cpu", devices=2,
    strategy={"ddp": "ddp", "fsdp": FullyShardedStrategy()}[sys.argv[3]],
    max_steps=4, check_val_every_n_epoch=None, use_distributed_sampler=False, logger=False,
    gradient_clip_val=1.0, limit_val_batches=0, plugins=[SafeCheckpointIO()],
    callbacks=[monitor, Spoil(), skip, watch, keeper], **quiet
)
trainer.fit(latent_diffusion(ClipTextEncoder(sys.argv[2])), datamodule=shapes_data(sys.argv[1]))
assert skip.skipped == 1
if trainer.is_global_zero:
    first, second, third, _ = watch.seen
    assert all(torch.equal(first[name], second[name]) for name in first), "the step was taken"
    assert any(not torch.equal(second[name], third[name]) for name in first)
    assert all(value.isfinite().all() for value in third.values())
    whole = checkpoint.read_checkpoint(checkpoint.Path("checkpoints/last.ckpt"))
    assert all(torch.equal(whole["state_dict"][name], _[name]) for name in first)
"""


@pytest.fixture
def ranks(tmp_path, shapes, tiny_clip):
    """Two processes; a second one's pictures are spoiled at certain steps, counted from 0."""
    tiny_clip.save(tmp_path / "clip")
    script = tmp_path / "rank.py"
    script.write_text(f"import sys\nsys.path.append({str(ROOT / 'tests' / 'helpers')!r})\n{RANKS}")

    def start(strategy: str, bad: list[int], stop_after: int) -> str:
        given = [str(shapes), str(tmp_path / "clip"), strategy, json.dumps(bad), str(stop_after)]
        return run(str(script), *given, cwd=tmp_path)

    return start


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="gloo")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_ranks_skip_a_step_that_one_rank_cannot_use(tmp_path, ranks, strategy):
    ranks(strategy, [1], 3)
    [told] = json.loads((tmp_path / "bad.json").read_text())
    assert told["step"] == 2
    assert [(batch["rank"], batch["loss"] == "nan") for batch in told["batches"]] == [
        (0, False),
        (1, True),
    ]
    assert [batch["positions"] for batch in told["batches"]] == [[4, 5], [6, 7]]
