"""Between two logging steps the host neither reads from the device nor waits for it."""

import traceback
from pathlib import Path

import lightning as L
import pytest
import torch
from evaluated_runs import TINY
from hydra import compose, initialize_config_dir
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.config.composition import CONF_DIR
from ldm.config.run import build_job

EVERY = 4
READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"}
OPERATIONS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "is_nonzero"}
# On the CPU, where nothing waits, the average reads whether the step was skipped.
ALLOWED = ("ema.py", "update")


def train(folder: Path, shapes: Path, tiny_clip, between: L.Callback, *words: str) -> None:
    """Eight steps with every callback of a run, and `between` before them."""
    tiny_clip.save(folder / "clip")
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        given = [*TINY, "data=shards", f"data.train={shapes}", f"data.val={shapes}", "name=x"]
        given += [f"text_encoder.path={folder}/clip", f"trainer.log_every_n_steps={EVERY}"]
        given += ["trainer.max_steps=8", "trainer.val_check_interval=1000", *words]
        cfg = compose("train", overrides=given)
    job = build_job(cfg, folder / "run")
    job.trainer.callbacks.insert(0, between)
    job.trainer.fit(job.module, datamodule=job.data)


class BetweenLogs(L.Callback):
    """Calls `begin` after the first logging step and `end` where the second is about to be logged.

    It must be the first callback.
    """

    has_begun = False

    def on_train_batch_start(self, trainer, *args) -> None:
        if trainer.global_step == EVERY and not self.has_begun:
            self.has_begun = True
            self.begin()

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step == 2 * EVERY:
            self.end()


class ListReads(BetweenLogs):
    """Lists the places in which something reads a tensor's values."""

    def __init__(self) -> None:
        self.places: list[str] = []
        note = self.note

        class Functions(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                note(getattr(function, "__name__", ""), READS)
                return function(*args, **kwargs or {})

        class Operations(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                note(function.overloadpacket.__name__, OPERATIONS)
                return function(*args, **kwargs or {})

        self.modes = Functions(), Operations()
        self.ended = False

    def note(self, name: str, reads: set[str]) -> None:
        if name in reads:
            frames = [f for f in traceback.extract_stack() if "torch" not in Path(f.filename).parts]
            if ALLOWED not in [(Path(frame.filename).name, frame.name) for frame in frames]:
                where = " < ".join(f"{f.filename}:{f.lineno}" for f in frames[-3::-1][:4])
                self.places.append(f"{name} at {where}")

    def begin(self) -> None:
        for mode in self.modes:
            mode.__enter__()

    def end(self) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(None, None, None)
        self.ended = True


@pytest.mark.parametrize("words", [(), ("trainer.accumulate_grad_batches=2", "task=superres")])
def test_a_step_between_two_logs_reads_no_tensor(tmp_path, shapes, tiny_clip, words):
    reads = ListReads()
    train(tmp_path, shapes, tiny_clip, reads, *words)
    assert reads.ended
    assert not reads.places, "\n".join(reads.places)


@pytest.mark.parametrize(
    "read", [torch.Tensor.item, torch.Tensor.tolist, float, bool, int, lambda x: x.nonzero()]
)
def test_a_read_is_seen(read):
    reads, value = ListReads(), torch.ones(())
    reads.begin()
    try:
        read(value)
    finally:
        reads.end()
    assert reads.places


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_step_between_two_logs_does_not_wait_for_the_gpu(tmp_path, shapes, tiny_clip, precision):
    class RefuseWaiting(BetweenLogs):
        def begin(self) -> None:
            torch.cuda.set_sync_debug_mode("error")

        def end(self) -> None:
            torch.cuda.set_sync_debug_mode("default")

    how = ("trainer.accelerator=gpu", f"trainer.precision={precision}")
    between = RefuseWaiting()
    try:
        train(tmp_path, shapes, tiny_clip, between, *how)
    finally:
        between.end()
