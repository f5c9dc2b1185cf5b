"""What is seen of jobs that run elsewhere: a line for each, read from its metrics.csv."""

import sys
import time
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from ldm.experiments.run_dir import find_last_value, read_metrics


class MonitoredJob(Protocol):
    """What must be known of a job to watch it."""

    label: str
    directory: Path
    metric: str
    steps: int


def print_above_progress(text: str) -> None:
    """Print above the lines of progress."""
    tqdm.write(text)
    sys.stdout.flush()


class ProgressLines:
    """A line of progress for each running job; where nothing can be drawn over, one a minute."""

    def __init__(self) -> None:
        self.bars: dict[MonitoredJob, tqdm] = {}
        self.drawn = self.printed_at = time.monotonic()

    def __enter__(self) -> "ProgressLines":
        return self

    def __exit__(self, *error) -> None:
        for bar in self.bars.values():
            bar.close()

    def begin(self, job: MonitoredJob) -> None:
        again = any(job.directory.glob("checkpoints/*.ckpt"))
        print_above_progress(f"{job.label}: {'goes on' if again else 'begins'} in {job.directory}")
        taken = {-bar.pos for bar in self.bars.values()}
        place = next(i for i in range(len(taken) + 1) if i not in taken)
        self.bars[job] = tqdm(
            total=job.steps,
            desc=job.label,
            unit="step",
            position=place,
            leave=False,
            disable=None,
            dynamic_ncols=True,
        )

    def end(self, job: MonitoredJob) -> None:
        self.bars.pop(job).close()

    def refresh(self) -> None:
        now = time.monotonic()
        if now - self.drawn < 1:
            return
        self.drawn = now
        aloud = not sys.stderr.isatty() and now - self.printed_at >= 60
        self.printed_at = now if aloud else self.printed_at
        for job, bar in self.bars.items():
            rows = read_metrics(job.directory, tail=20_000)
            if not rows:
                continue
            step = int(rows[-1]["step"])
            facts = {
                name: f"{found:.4g}"
                for name, key in {
                    "loss": "train/loss",
                    job.metric: job.metric,
                    "images/s": "perf/images_per_s",
                }.items()
                if (found := find_last_value(rows, key)) is not None
            }
            if step < bar.n or not bar.n:  # a resumed job is timed from where it resumed
                bar.initial = bar.n = step
            bar.set_postfix(facts, refresh=False)
            bar.update(step - bar.n)
            bar.refresh()
            if aloud:
                words = ", ".join(f"{k} {v}" for k, v in facts.items())
                print_above_progress(f"{job.label}: step {step} of {job.steps}, {words}")
