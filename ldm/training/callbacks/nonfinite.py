"""Skips optimizer steps whose loss or gradient is not finite, counts them, and stops after many."""

import json
import math
import warnings
from collections import deque
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.distributed import all_gather_object
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from ldm.training.callbacks.monitoring import ThroughputMonitor
from ldm.training.lightning_adapter import replace_gradient_clipping
from ldm.utils.checkpoint_file import find_last_good_checkpoint
from ldm.utils.files import write_text

NON_FINITE_REMEDY = "take a lower optimizer.lr or trainer.precision=32-true"


class NotFiniteError(RuntimeError):
    """Weights, validation losses or many steps in a row are not finite."""


def check_finite_weights(trainer: L.Trainer, folder: Path, *, skipped_from: int | None) -> None:
    """Raises NotFiniteError on all ranks if the weights are not finite.

    skipped_from: the first step of the current row of skipped steps.
    """
    weights = trainer.lightning_module.parameters()
    parts = [w.to_local() if isinstance(w, DTensor) else w for w in weights]
    # Waits for the device once.
    finite = bool(torch.stack([part.detach().isfinite().all() for part in parts]).all())
    if not trainer.strategy.reduce_boolean_decision(finite, all=True):
        raise NotFiniteError(
            f"the weights are not finite after step {trainer.global_step}, and not saved. "
            f"{format_last_good_checkpoint(folder, skipped_from)}; {NON_FINITE_REMEDY}"
        )


def format_last_good_checkpoint(folder: Path, before: int | None) -> str:
    """Returns a sentence about the newest checkpoint from before a step."""
    path = find_last_good_checkpoint(folder, before=before)
    return f"The last good checkpoint is {path or 'none yet'}"


def find_non_finite_metrics(metrics: Mapping[str, object], metric: str) -> list[str]:
    """Returns which of val/loss and `metric`, if that is a val/ metric, are not finite.

    Means over training steps do not count: they include skipped steps.
    """
    names = {"val/loss", metric}
    values = {name: metrics.get(name) for name in sorted(names) if name.startswith("val/")}
    return [n for n, value in values.items() if value is not None and not math.isfinite(value)]


class NonFiniteStepSkipper(L.Callback):
    """Skips an update, on all ranks alike, whose loss or gradient is NaN or infinite.

    Weights, moments and averages stay bit for bit; step number, learning rate and data advance.
    The device decides. The host reads the result when `monitor` has logged, and then logs
    train/skipped_steps (of the whole run), warns, and writes the batches to `report`. After
    `stop_after` skipped steps in a row it raises NotFiniteError on all ranks.
    """

    state_key = "SkipNonFinite"  # its former name, under which checkpoints hold its state

    def __init__(self, report: Path, *, monitor: ThroughputMonitor, stop_after: int) -> None:
        self.report, self.monitor, self.stop_after = report, monitor, stop_after
        self.skipped = self.num_reported = 0
        self.in_a_row = 0
        self.bad: deque[dict] = deque(maxlen=stop_after)  # the last skipped steps of this rank

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.accumulate = trainer.accumulate_grad_batches
        self.last_checked_step = trainer.global_step
        # Since the last count: of this rank's micro-batches, and of the steps.
        self.losses: list[Tensor] = []
        self.batches: list[dict] = []
        self.flags: list[Tensor] = []  # 1.0 for a skipped step
        self.steps: list[int] = []
        replace_gradient_clipping(trainer, partial(self.measure_norm, module))

    def on_before_backward(self, trainer: L.Trainer, module, loss: Tensor) -> None:
        # The gradient tells all ranks: if the loss is not finite, no gradient is.
        finite = loss.detach().isfinite()
        loss.register_hook(lambda gradient: torch.where(finite, gradient, torch.nan))
        self.losses.append(loss.detach())

    def measure_norm(
        self, module: L.LightningModule, optimizer: Optimizer, weights: list[Tensor]
    ) -> Tensor:
        """Returns the norm () of all gradients; has the step skipped where it is not finite."""
        norm = get_total_norm([w.grad for w in weights if w.grad is not None])
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        module.skipped = (~whole.isfinite()).float()
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = module.skipped  # as torch's GradScaler does
        elif module.skipped:  # waits for the device
            optimizer.zero_grad(set_to_none=True)
        self.flags.append(module.skipped)
        self.steps.append(module.trainer.global_step + 1)
        return norm

    def on_train_batch_end(self, trainer: L.Trainer, module, outputs, batch, batch_idx) -> None:
        self.batches.append({"positions": batch["position"], "keys": batch["key"]})
        self._log(trainer)

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._log(trainer)

    def _log(self, trainer: L.Trainer) -> None:
        step = trainer.global_step
        if self.monitor.last_logged_step != step or self.last_checked_step == step:
            return
        self.last_checked_step = step
        self.count_skipped_steps()
        for logger in trainer.loggers:
            logger.log_metrics({"train/skipped_steps": self.skipped}, step=step)
        if self.skipped > self.num_reported:
            self.report_skipped_steps(trainer)

    def find_first_skipped_step(self, step: int) -> int | None:
        """Returns the first of the skipped steps in a row that end at `step`; None without one."""
        self.count_skipped_steps()
        return step - self.in_a_row + 1 if self.in_a_row else None

    def count_skipped_steps(self) -> None:
        """Counts the skipped steps since the last count; waits for the device."""
        if not self.flags or self.in_a_row == self.stop_after:
            return
        flags, losses = (torch.stack(values).tolist() for values in (self.flags, self.losses))
        for i, (step, skipped) in enumerate(zip(self.steps, flags, strict=True)):
            if not skipped:
                self.in_a_row = 0
                continue
            self.skipped += 1
            self.in_a_row += 1
            own = slice(i * self.accumulate, (i + 1) * self.accumulate)
            parts = zip(losses[own], self.batches[own], strict=True)
            batches = [{"loss": str(loss * self.accumulate), **batch} for loss, batch in parts]
            self.bad.append({"step": step, "batches": batches})
            if self.in_a_row == self.stop_after:
                break
        done = len(flags) * self.accumulate
        self.losses, self.batches = self.losses[done:], self.batches[done:]
        self.flags, self.steps = [], []

    def report_skipped_steps(self, trainer: L.Trainer) -> None:
        """Writes the batches to `report` and warns; all ranks take part.

        Raises NotFiniteError after `stop_after` skipped steps in a row.
        """
        new = [str(bad["step"]) for bad in self.bad][self.num_reported - self.skipped :]
        self.num_reported = self.skipped
        of_ranks = [list(self.bad)]
        if trainer.world_size > 1:
            of_ranks = [None] * trainer.world_size
            all_gather_object(of_ranks, list(self.bad))
        message = (
            f"the loss or the gradient was not finite at step {', '.join(new)}: left out. "
            f"{self.report} names the samples"
        )
        too_many = self.in_a_row >= self.stop_after
        if trainer.is_global_zero:
            try:
                write_text(self.report, json.dumps(merge_rank_reports(of_ranks), indent=1) + "\n")
            except OSError as error:
                message += f", or would: {error.strerror}"
            for logger in trainer.loggers:
                logger.alert("steps that are not finite", message)
            if not too_many:
                warnings.warn(message, stacklevel=2)
        if too_many:
            folder = self.report.parent / "checkpoints"
            before = self.find_first_skipped_step(trainer.global_step)
            good = format_last_good_checkpoint(folder, before)
            raise NotFiniteError(
                f"{message}. {self.stop_after} in a row are too many (stop_after_skips). {good}. "
                f"Look at the samples, or {NON_FINITE_REMEDY}"
            )

    def state_dict(self) -> dict:
        self.count_skipped_steps()
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict) -> None:
        self.skipped = self.num_reported = state["skipped"]
        self.in_a_row = state.get("in_a_row", 0)


def merge_rank_reports(of_ranks: list[list[dict]]) -> list[dict]:
    """Merges the ranks' lists of the same steps into one list."""
    merged = []
    for parts in zip(*of_ranks, strict=True):
        ranks = enumerate(part["batches"] for part in parts)
        batches = [{"rank": rank, **batch} for rank, own in ranks for batch in own]
        merged.append({"step": parts[0]["step"], "batches": batches})
    return merged
