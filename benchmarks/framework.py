"""What the framework costs above a bare loop of the same module.

    python -m benchmarks.framework                   # 7 rounds of 20 steps, and where time goes
    python -m benchmarks.framework --workers 0 --logger tensorboard
    python -m benchmarks.framework --quick           # does it run?

A run of `train.py` (model=nano, 64 px, batches of 2, logger=csv) trains as always. At the beginning
of each of its steps a callback trains the same module on the same batch once more, by a loop of a
few lines: forward, backward, clipping, AdamW, learning rate, average. So both alternate step by
step in one process. The difference is what Lightning, our callbacks, the logger and the loading of
batches cost: CPU ms a step of the main process, without that of the workers.
The second table says where the time goes: by hook, as Lightning's profiler names them, without the
time of the hooks inside; beside it what the bare loop takes for the same work. These steps are
slower, for clocks take time as well.
"""

import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from statistics import mean

from tqdm import tqdm

from benchmarks import harness

SETTLING = 10  # steps before the first that counts
PARTS = {  # of the bare loop, and the hook that does the same
    "forward": "[Strategy]SingleDeviceStrategy.training_step",
    "zero_grad": "[LightningModule]LatentDiffusion.optimizer_zero_grad",
    "backward": "[Strategy]SingleDeviceStrategy.backward",
    "clip": "[LightningModule]LatentDiffusion.configure_gradient_clipping",
    "optimizer": "[LightningModule]LatentDiffusion.optimizer_step",
    "curve": "[LightningModule]LatentDiffusion.lr_scheduler_step",
}


def main(words: list[str] | None = None) -> None:
    """Measures one run."""
    parser = harness.make_parser("framework", __doc__)
    parser.add_argument("--steps", type=int, default=20, help="of a round (default: 20)")
    parser.add_argument("--workers", type=int, default=2, help="that load (default: 2)")
    parser.add_argument("--logger", default="csv", help="as in train.py (default: csv)")
    args = harness.parse(parser, words)
    if args.quick:
        args.steps = 3
    with tempfile.TemporaryDirectory() as folder:
        costs, hooks = measure(Path(folder), args)
    report = harness.Report(args, steps=args.steps, workers=args.workers, logger=args.logger)
    report.add("a step of model=nano, batch 2", costs)
    report.add("where the time goes", hooks)


def measure(folder: Path, args) -> tuple[list[harness.Row], list[harness.Row]]:
    """Returns the rows of both tables."""
    import lightning as L
    from lightning.pytorch.profilers import PassThroughProfiler

    import ldm
    from benchmarks.networks import write_blank_shards
    from benchmarks.train_step import train_bare
    from ldm.config.run import build_job

    measured, profiled = args.rounds * args.steps, 2 * args.steps
    data = write_blank_shards(folder / "data", 64)
    cfg = ldm.compose(
        "train",
        [
            "name=bench", "data=shards", f"data.train={data}", f"data.val={data}", "data.size=64",
            "data.batch_size=2", f"data.workers={args.workers}", "trainer=cpu", "eval=none",
            "features=none", f"logger={args.logger}", "samples.n=0", "validate_first=false",
            f"trainer.max_steps={SETTLING + measured + profiled + 1}",
            "trainer.limit_val_batches=1", "trainer.val_check_interval=100000",
        ],
    )  # fmt: skip
    job = build_job(cfg, folder / "run")

    bare: list[float] = []
    whole: list[float] = []
    profiler = make_profiler()

    class BareLoop(L.Callback):
        """Trains the module once more before each step of the trainer."""

        ended: float | None = None

        def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
            began = time.process_time()
            if self.ended is not None:
                whole.append(began - self.ended)
                bar.update()
            clock = profiler.profile if trainer.profiler is profiler else no_clock
            parts = trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler
            train_bare(module, batch, *parts, trainer.precision_plugin, batch_idx + 1, clock)
            if batch_idx == SETTLING + measured:
                trainer.profiler = profiler
            elif batch_idx == SETTLING + measured + profiled:
                trainer.profiler = PassThroughProfiler()
            self.ended = time.process_time()
            bare.append(self.ended - began)

    job.trainer.callbacks.append(BareLoop())
    total = SETTLING + measured + profiled
    bar = tqdm(total=total, desc="steps", leave=False, disable=None)
    with bar, harness.silence():
        job.trainer.fit(job.module, datamodule=job.data)

    def average(seconds: list[float]) -> list[float]:
        """The mean ms of the steps of each round: the steps that log are among them."""
        own = seconds[SETTLING : SETTLING + measured]
        return [1e3 * mean(own[i : i + args.steps]) for i in range(0, measured, args.steps)]

    loop, trainer = average(bare), average(whole)
    above = [b - a for a, b in zip(loop, trainer, strict=True)]
    rounds = {"the bare loop": loop, "train.py": trainer, "the difference": above}
    costs = [harness.summarize(what, values, unit="ms") for what, values in rounds.items()]
    step = 1e3 * mean(whole[SETTLING + measured : SETTLING + measured + profiled])
    return costs, profiler.list_rows(steps=profiled, total=step)


def no_clock(name: str) -> nullcontext:
    return nullcontext()


def make_profiler():
    """Returns a profiler of Lightning's: the CPU time of each hook without its inner ones."""
    from lightning.pytorch.profilers import Profiler

    class HookClock(Profiler):
        def __init__(self) -> None:
            super().__init__()
            self.own: Counter[str] = Counter()
            self.open: list[list] = []  # [name, since, seconds of inner ones]

        def start(self, action_name: str) -> None:
            self.open.append([action_name, time.process_time(), 0.0])

        def stop(self, action_name: str) -> None:
            if not self.open or self.open[-1][0] != action_name:
                return  # it began before the profile
            _, since, inner = self.open.pop()
            took = time.process_time() - since
            self.own[action_name] += took - inner
            if self.open:
                self.open[-1][2] += took

        def list_rows(self, *, steps: int, total: float, least: float = 0.01) -> list[harness.Row]:
            """Rows from the greatest ms a step down; total: ms of a whole step."""
            each = {name: 1e3 * seconds / steps for name, seconds in self.own.items()}
            bare = {hook: each.pop(part, 0.0) for part, hook in PARTS.items()}
            own = {name: ms for name, ms in each.items() if "BareLoop" not in name}
            own["between the hooks"] = total - sum(own.values())
            rows = [
                {"hook": name, "ms": ms, "bare": bare.get(name), "above": ms - bare.get(name, 0.0)}
                for name, ms in own.items()
                if ms >= least
            ]
            rows.sort(key=lambda row: -row["above"])
            loop = sum(bare.values())
            whole = {"hook": "a step with clocks", "ms": total, "bare": loop, "above": total - loop}
            return [whole, *rows]

    return HookClock()


if __name__ == "__main__":
    main()
