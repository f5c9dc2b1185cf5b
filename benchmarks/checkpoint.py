"""What a save costs a training: python benchmarks/checkpoint.py [MILLION_PARAMETERS=100].

A real Trainer with Checkpoints, on a state like a diffusion run's: weights, their average and
AdamW's two moments, 16 bytes a parameter. The stall is the time that the training thread spends in
the callback. Each way runs in a process of its own, for its peak memory.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

STEPS, EVERY = 18, 6  # saves at 6, 12, 18: the first also pays for the copy's memory


def measure(million: int, background: bool, folder: Path) -> dict:
    """Seconds of a plain step, of the stalls, of the whole save; peak memory in GiB."""
    import lightning as L
    import torch
    from torch import nn

    from ldm.training.callbacks.checkpoint_storage import CheckpointWriter, SafeCheckpointIO
    from ldm.training.callbacks.checkpointing import Checkpoints
    from ldm.training.ema import EMA

    class Data(L.LightningDataModule):
        position = 0

        def train_dataloader(self):
            return [torch.ones(1)] * STEPS

    class Net(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.denoiser = nn.ParameterList(torch.randn(1000, 1000) for _ in range(million))
            self.ema = EMA(self.denoiser, decay=0.999)

        def training_step(self, batch, i):
            return sum((weight * 1e-3).square().mean() for weight in self.denoiser)

        def optimizer_step(self, epoch, i, optimizer, closure=None) -> None:
            super().optimizer_step(epoch, i, optimizer, closure)
            self.ema.update(self.denoiser, step=self.trainer.global_step + 1)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.denoiser.parameters(), lr=1e-3, fused=True)

    class Clock(L.Callback):
        def __init__(self) -> None:
            self.at: list[float] = []
            self.busy: list[bool] = []

        def on_train_batch_start(self, *args) -> None:
            self.at.append(time.perf_counter())
            self.busy.append(keeper.writer.is_busy)

    class Timed(Checkpoints):
        def save(self, trainer, **suffix) -> None:
            began = time.perf_counter()
            super().save(trainer, **suffix)
            stalls.append(time.perf_counter() - began)

    class TimedWriter(CheckpointWriter):
        def _write(self, *args) -> None:
            began = time.perf_counter()
            super()._write(*args)
            wrote.append(time.perf_counter() - began)

    wrote: list[float] = []
    stalls: list[float] = []
    keeper = Timed(folder, every=EVERY, keep=2, facts={}, background=background)
    keeper.writer.__class__ = TimedWriter
    clock = Clock()
    quiet = {f"enable_{what}": False for what in ("checkpointing", "model_summary", "progress_bar")}
    trainer = L.Trainer(
        accelerator="cpu", max_steps=STEPS, logger=False, callbacks=[clock, keeper],
        plugins=[SafeCheckpointIO()], **quiet,
    )  # fmt: skip
    trainer.fit(Net(), datamodule=Data())
    took = [b - a for a, b in zip(clock.at, clock.at[1:], strict=False)]
    plain = [t for i, t in enumerate(took) if i > 1 and (i + 1) % EVERY and not clock.busy[i]]
    beside = [t for i, t in enumerate(took) if clock.busy[i] and (i + 1) % EVERY]
    return {
        "step_s": round(median(plain), 3),
        "first_stall_s": round(stalls[0], 3),
        "stall_s": round(stalls[1], 3),
        "write_s": round(median(wrote), 3),
        "step_while_writing_s": round(median(beside), 3) if beside else None,
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def main() -> None:
    million = sys.argv[1] if len(sys.argv) > 1 else "100"
    if len(sys.argv) > 2:
        print(json.dumps(measure(int(million), sys.argv[2] == "True", Path(sys.argv[3]))))
        return
    results = {}
    for background in (False, True):
        with tempfile.TemporaryDirectory(dir=".") as folder:
            command = [sys.executable, __file__, million, str(background), folder]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results[background] = json.loads(said.splitlines()[-1])
        print(f"background={background}: {results[background]}", flush=True)
    before, after = (results[background]["stall_s"] for background in (False, True))
    print(f"{million} M parameters: the training waits {before / max(after, 1e-3):.1f} times less")


if __name__ == "__main__":
    main()
