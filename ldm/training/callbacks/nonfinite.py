"""Steps whose loss or gradient is not finite are left out, counted, and not borne for ever."""

import json
import math
import warnings
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.distributed import all_gather_object
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from ldm.training.callbacks.monitoring import ThroughputMonitor
from ldm.utils.checkpoint_file import find_last_good_checkpoint
from ldm.utils.files import write_text


class NotFiniteError(RuntimeError):
    """The training met numbers that are not finite, step after step."""


NON_FINITE_REMEDY = "take a lower optimizer.lr or trainer.precision=32-true"


def are_weights_finite(weights: Iterable[Tensor]) -> bool:
    """Whether this rank's part of the weights is finite; waits for the device once."""
    parts = (w.to_local() if isinstance(w, DTensor) else w for w in weights)
    return bool(torch.stack([part.detach().isfinite().all() for part in parts]).all())


def check_finite_weights(trainer: L.Trainer, folder: Path) -> None:
    """Raise NotFiniteError on all ranks where the weights are not finite."""
    finite = are_weights_finite(trainer.lightning_module.parameters())
    if not trainer.strategy.reduce_boolean_decision(finite, all=True):
        raise NotFiniteError(
            f"the weights are not finite after step {trainer.global_step}, and not saved. "
            f"{format_last_good_checkpoint(folder, find_first_skipped_step(trainer))}; "
            f"{NON_FINITE_REMEDY}"
        )


def format_last_good_checkpoint(folder: Path, before: int | None) -> str:
    """A sentence about the newest checkpoint from before a step."""
    path = find_last_good_checkpoint(folder, before=before)
    return f"The last good checkpoint is {path or 'none yet'}"


def find_first_skipped_step(trainer: L.Trainer) -> int | None:
    """The first of the steps that are left out by now, in a row; None where there is none."""
    for callback in trainer.callbacks:
        if isinstance(callback, NonFiniteStepSkipper):
            callback.look()
            return trainer.global_step - callback.in_a_row + 1 if callback.in_a_row else None
    return None


def find_non_finite_metrics(metrics: Mapping[str, object], metric: str) -> list[str]:
    """The names of values that tell of ruined weights: of the validation loss and of `metric`.

    Means over training steps do not: they hold those of steps that were left out.
    """
    names = {"val/loss", metric}
    found = {name: metrics.get(name) for name in sorted(names) if name.startswith("val/")}
    return [n for n, value in found.items() if value is not None and not math.isfinite(value)]


class NonFiniteStepSkipper(L.Callback):
    """Leaves an update out, on all ranks alike, where a loss or the gradient is NaN or infinite.

    Weights, moments and averages stay what they were, bit for bit; step number, learning rate and
    data go on. That is decided on the device; the host looks when `meter` has logged, and then
    logs train/skipped_steps (of the whole run), warns, and writes the batches to `report`. After
    `stop_after` such steps in a row it raises NotFiniteError on all ranks.
    """

    state_key = "SkipNonFinite"  # its former name, under which checkpoints hold its state

    def __init__(self, report: Path, *, monitor: ThroughputMonitor, stop_after: int) -> None:
        if stop_after < 1:
            raise ValueError(f"stop_after_skips={stop_after} must be 1 or more")
        self.report = report
        self.meter = monitor
        self.stop_after = stop_after
        self.skipped = self.told = 0
        self.in_a_row = 0
        self.bad: deque[dict] = deque(maxlen=stop_after)  # the last steps left out, of this rank

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.accumulate = trainer.accumulate_grad_batches
        self.last_checked_step = trainer.global_step
        # Since the last look: of this rank's micro-batches, and of the steps.
        self.losses: list[Tensor] = []
        self.batches: list[dict] = []
        self.flags: list[Tensor] = []  # 1.0 where a step was left out
        self.steps: list[int] = []

    def on_before_backward(self, trainer: L.Trainer, module, loss: Tensor) -> None:
        # The gradient carries the news to all ranks: where the loss is not finite, none of it is.
        finite = loss.detach().isfinite()
        loss.register_hook(lambda gradient: torch.where(finite, gradient, torch.nan))
        self.losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: L.Trainer, module, optimizer: Optimizer) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        norm = get_total_norm([w.grad for w in weights if w.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        module.skipped = (~norm.isfinite()).float()
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = module.skipped  # as torch's GradScaler tells it
        elif module.skipped:  # waits for the device
            optimizer.zero_grad(set_to_none=True)
        self.flags.append(module.skipped)
        self.steps.append(trainer.global_step + 1)

    def on_train_batch_end(self, trainer: L.Trainer, module, outputs, batch, batch_idx) -> None:
        self.batches.append({"positions": batch["position"], "keys": batch["key"]})
        self._log(trainer)

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._log(trainer)

    def _log(self, trainer: L.Trainer) -> None:
        if (
            self.meter.logged != trainer.global_step
            or self.last_checked_step == trainer.global_step
        ):
            return
        self.last_checked_step = trainer.global_step
        self.look()
        for logger in trainer.loggers:
            logger.log_metrics({"train/skipped_steps": self.skipped}, step=trainer.global_step)
        if self.skipped > self.told:
            self.tell(trainer)

    def look(self) -> None:
        """Take account of the whole steps since the last look; waits for the device."""
        if not self.flags or self.in_a_row == self.stop_after:
            return
        flags, losses = (torch.stack(values).tolist() for values in (self.flags, self.losses))
        for i, (step, left_out) in enumerate(zip(self.steps, flags, strict=True)):
            if not left_out:
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

    def tell(self, trainer: L.Trainer) -> None:
        """Write the batches down and warn; NotFiniteError after too many. All ranks take part."""
        new = [str(bad["step"]) for bad in self.bad][self.told - self.skipped :]
        self.told = self.skipped
        of_ranks = [list(self.bad)]
        if trainer.world_size > 1:
            of_ranks = [None] * trainer.world_size
            all_gather_object(of_ranks, list(self.bad))
        said = (
            f"the loss or the gradient was not finite at step {', '.join(new)}: left out. "
            f"{self.report} names the samples"
        )
        too_many = self.in_a_row >= self.stop_after
        if trainer.is_global_zero:
            try:
                write_text(self.report, json.dumps(merge_rank_reports(of_ranks), indent=1) + "\n")
            except OSError as error:
                said += f", or would: {error.strerror}"
            if not too_many:
                warnings.warn(said, stacklevel=2)
        if too_many:
            good = format_last_good_checkpoint(
                self.report.parent / "checkpoints", find_first_skipped_step(trainer)
            )
            raise NotFiniteError(
                f"{said}. {self.stop_after} in a row are too many (stop_after_skips). {good}. Look "
                f"at the samples, or {NON_FINITE_REMEDY}"
            )

    def state_dict(self) -> dict:
        self.look()
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict) -> None:
        self.skipped = self.told = state["skipped"]
        self.in_a_row = state.get("in_a_row", 0)


def merge_rank_reports(of_ranks: list[list[dict]]) -> list[dict]:
    """The same steps as seen by each rank, one after another, as one list of steps."""
    return [
        {
            "step": parts[0]["step"],
            "batches": [
                {"rank": rank, **batch}
                for rank, part in enumerate(parts)
                for batch in part["batches"]
            ],
        }
        for parts in zip(*of_ranks, strict=True)
    ]
