"""Ends a run early, by its own curve or by the curves of the other jobs of its sweep."""

from pathlib import Path
from statistics import median

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping

from ldm.experiments.run_dir import read_metrics
from ldm.utils.files import resolve_path


def patience_stopping(
    *, metric: str, direction: str, validations: int, min_delta: float = 0.0
) -> EarlyStopping:
    """Stops after `validations` validations without a gain of more than `min_delta`.

    Validations that do not measure the metric do not count.
    """
    how = {"patience": validations, "min_delta": min_delta, "strict": False}
    return EarlyStopping(monitor=metric, mode=direction[:3], **how)


class MedianStopping(L.Callback):
    """Stops a sweep's job whose best value so far is worse than the other jobs' median.

    The median stopping rule (Golovin et al. 2017, Vizier, section 3.2.2), at the same step, on the
    metrics.csv of the directories next to this run's. At least `others` of them must have reached
    the step, and at least `min_steps` optimizer steps are taken. Which jobs stop depends on the
    order in which they run.
    """

    def __init__(
        self, run_dir: str, *, metric: str, direction: str, others: int = 3, min_steps: int = 0
    ) -> None:
        self.run_dir = resolve_path(run_dir)
        self.metric, self.others, self.min_steps = metric, others, min_steps
        self.best = min if direction == "minimize" else max

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.global_step < max(self.min_steps, 1):
            return
        if trainer.strategy.broadcast(trainer.is_global_zero and self.is_behind(trainer)):
            trainer.should_stop = True

    def is_behind(self, trainer: L.Trainer) -> bool:
        """Returns whether the median of the other jobs' best values is better than this run's."""
        step = trainer.global_step
        others = [d for d in self.run_dir.parent.iterdir() if d.is_dir() and d != self.run_dir]
        values = [value for d in others if (value := self._best_until(d, step)) is not None]
        if len(values) < max(self.others, 1) or self.metric not in trainer.callback_metrics:
            return False
        own, before = float(trainer.callback_metrics[self.metric]), self._best_until(self.run_dir)
        own = own if before is None else self.best(own, before)
        middle = median(values)
        if self.best(own, middle) == own:
            return False
        print(
            f"stopped early at step {step}: {self.metric} was {own:.4g} at best, the median of "
            f"{len(values)} other jobs is {middle:.4g}"
        )
        return True

    def _best_until(self, directory: Path, step: int = 0) -> float | None:
        """Returns a run's best value up to a step (0: at all); None if it is not there yet."""
        rows = [row for row in read_metrics(directory) if self.metric in row]
        if not rows or rows[-1]["step"] < step:
            return None
        return self.best(row[self.metric] for row in rows if not step or row["step"] <= step)
