"""Progress of the jobs of a sweep: a line for each, read from its metrics.csv."""

import sys
import time

from tqdm import tqdm

from ldm.experiments.jobs import SweepJob
from ldm.experiments.run_dir import find_last_value, read_metrics


def print_above_progress(text: str) -> None:
    """Prints above the lines of progress."""
    tqdm.write(text)
    sys.stdout.flush()


class ProgressLines:
    """A line of progress for each running job; without a terminal, one is printed each minute."""

    def __init__(self) -> None:
        self.bars: dict[SweepJob, tqdm] = {}
        self.refreshed_at = self.printed_at = time.monotonic()

    def __enter__(self) -> "ProgressLines":
        return self

    def __exit__(self, *error: object) -> None:
        for bar in self.bars.values():
            bar.close()

    def begin(self, job: SweepJob) -> None:
        resumes = any(job.directory.glob("checkpoints/*.ckpt"))
        verb = "goes on" if resumes else "begins"
        print_above_progress(f"{job.label}: {verb} in {job.directory}")
        taken = {-bar.pos for bar in self.bars.values()}
        self.bars[job] = tqdm(
            total=job.steps,
            desc=job.label,
            unit="step",
            position=min(set(range(len(taken) + 1)) - taken),
            leave=False,
            disable=None,
            dynamic_ncols=True,
        )

    def end(self, job: SweepJob) -> None:
        self.bars.pop(job).close()

    def refresh(self) -> None:
        now = time.monotonic()
        if now - self.refreshed_at < 1:
            return
        self.refreshed_at = now
        prints = not sys.stderr.isatty() and now - self.printed_at >= 60
        self.printed_at = now if prints else self.printed_at
        for job, bar in self.bars.items():
            if not (rows := read_metrics(job.directory, tail=20_000)):
                continue
            step = int(rows[-1]["step"])
            keys = {"loss": "train/loss", job.metric: job.metric, "images/s": "perf/images_per_s"}
            values = {name: find_last_value(rows, key) for name, key in keys.items()}
            facts = {name: f"{value:.4g}" for name, value in values.items() if value is not None}
            if step < bar.n or not bar.n:  # a resumed job is timed from where it resumed
                bar.initial = bar.n = step
            bar.set_postfix(facts, refresh=False)
            bar.update(step - bar.n)
            bar.refresh()
            if prints:
                words = ", ".join(f"{name} {value}" for name, value in facts.items())
                print_above_progress(f"{job.label}: step {step} of {job.steps}, {words}")
