"""The parts of one training run together, and what result.json says of it."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import lightning as L

from ldm.data.datamodule import TextImageData
from ldm.experiments.ranking import build_ranking_table, find_runs, rank_runs, read_run_record
from ldm.experiments.run_dir import (
    find_last_value,
    get_launcher_rank,
    is_sweep_job,
    read_metrics,
    read_partial_result,
    write_result,
)
from ldm.training.callbacks.monitoring import ThroughputMonitor
from ldm.training.callbacks.nonfinite import (
    NON_FINITE_REMEDY,
    NotFiniteError,
    find_non_finite_metrics,
    format_last_good_checkpoint,
)
from ldm.training.distributed import FIRST_ERROR_FILE, format_exception, record_first_error
from ldm.utils.checkpoint_facts import read_state_dict
from ldm.utils.checkpoint_file import (
    check_module_state,
    find_newest_checkpoint,
    parse_checkpoint_step,
    read_unverified_checkpoint,
)
from ldm.utils.errors import UsageError
from ldm.utils.files import check_writable


@dataclass
class TrainingJob:
    """A run that is ready to train."""

    data: TextImageData
    module: L.LightningModule
    trainer: L.Trainer
    meter: ThroughputMonitor
    resume: Path | None  # the checkpoint that it resumes from

    def metrics(self) -> dict[str, float]:
        """Returns the newest value of each logged metric."""
        logged = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        return {**self.meter.latest, **logged}

    def outcome(self, run_dir: Path, metric: str) -> dict:
        """Returns the progress of the run so far, for result.json."""
        newest = run_dir / "checkpoints" / "last.ckpt"
        step = self.trainer.global_step
        if self.resume is not None and step < parse_checkpoint_step(self.resume):
            return read_partial_result(run_dir, metric)  # it ended while it loaded the checkpoint
        return {
            "metric": metric,
            "value": self.metrics().get(metric),
            "steps": step,
            "stopped_early": self.trainer.should_stop and step < self.trainer.max_steps,
            "images_seen": self.data.position,
            "checkpoint": os.path.relpath(newest.resolve(), run_dir) if newest.exists() else None,
        }

    def check_end(self, run_dir: Path, metric: str) -> None:
        """Raises NotFiniteError if the last validation shows that the weights are ruined."""
        rows = read_metrics(run_dir)  # of an earlier call, if there was nothing left to train
        values = {name: find_last_value(rows, name) for name in ("val/loss", metric)}
        values |= self.metrics()
        if names := find_non_finite_metrics(values, metric):
            finite = [row["step"] for row in rows if math.isfinite(row.get(names[0], math.nan))]
            folder, before = run_dir / "checkpoints", int(max(finite, default=-1)) + 1
            raise NotFiniteError(
                f"the last validation's {names[0]} is {values[names[0]]}. "
                f"{format_last_good_checkpoint(folder, before)}; {NON_FINITE_REMEDY}"
            )

    def failed(self, run_dir: Path, error: BaseException) -> tuple[str, bool]:
        """Returns the error that ended the run, and whether this rank must report it."""
        if self.trainer.world_size == 1:
            return format_exception(error), True
        message, own = record_first_error(run_dir, error, rank=self.trainer.global_rank)
        if not own:
            print(f"the first error was {message}", flush=True)
        return message, own

    def finish(self, run_dir: Path, metric: str, direction: str, result: dict) -> None:
        """Writes result.json and closes the loggers; a sweep's job also logs the ranking so far.

        A disk without room for result.json is reported, and the same command writes it later.
        """
        try:
            write_result(run_dir, result)
        except OSError as error:
            print(f"{run_dir}/result.json cannot be written: {error.strerror or error}", flush=True)
        if is_sweep_job(run_dir):
            jobs = [read_run_record(found) for found in find_runs([run_dir.parent])]
            columns, rows = build_ranking_table(
                rank_runs(jobs, metric, direction=direction), metric
            )
        status, where = result["status"], f"{run_dir} at step {result['steps']}"
        for logger in self.trainer.loggers:
            if is_sweep_job(run_dir):
                logger.log_table("ranking", columns=columns, data=rows)
            if status != "finished":
                logger.alert(f"run {status}", result.get("error", f"{where} was preempted"))
            logger.finish(status=status)

    def describe(self) -> str:
        """Returns one line: where the run begins, what is trained, on what, how long."""
        begins = "begins"
        if self.resume is not None:
            begins = f"resumes from step {parse_checkpoint_step(self.resume)}"
        trained = sum(p.numel() for p in self.module.parameters() if p.requires_grad) / 1e6
        digits = 1 if trained > 0.5 else 3
        kind = "images" if self.data.frames is None else "videos"
        return (
            f"{begins}: {type(self.module).__name__}, {trained:.{digits}f} M parameters, on "
            f"{len(self.data.train_set)} {kind} ({len(self.data.val_set)} for validation): "
            f"{self.trainer.max_steps} steps of {self.data.batch_size} {kind} on "
            f"{self.trainer.world_size} x {self.trainer.strategy.root_device.type}, "
            f"precision {self.trainer.precision}"
        )


def prepare_run_directory(
    run_dir: Path,
    module: L.LightningModule,
    frozen: Mapping[str, str],
    *,
    rules: Mapping[str, object] = MappingProxyType({}),
) -> Path | None:
    """Returns the checkpoint to resume from, if there is one; removes what earlier calls left.

    frozen: digests of the parts that must be those of the checkpoint. rules: of the data; where a
    cache is or was among them, it must be of the same images.
    """
    first, resume = get_launcher_rank() == 0, find_newest_checkpoint(run_dir / "checkpoints")
    if first:
        check_writable(run_dir / "checkpoints")
        (run_dir / FIRST_ERROR_FILE).unlink(missing_ok=True)  # of an earlier call
    if resume is not None:
        payload = read_unverified_checkpoint(resume)
        check_module_state(module, read_state_dict(payload, resume), what=str(resume))
        facts = payload.get("ldm")
        facts = facts if isinstance(facts, dict) else {}
        before = facts.get("frozen")
        before = before if isinstance(before, dict) else {}
        source = rules.get("source")
        if (rules.get("cached") or facts.get("cached")) and facts.get("source", source) != source:
            raise UsageError(
                f"{run_dir} was trained on other images than those of data.train: give the cache, "
                "or the images, that it began with, another name=... for a new run, or "
                "resume.allow=[data,source] to go on with these"
            )
        if rules:
            check_same_order(run_dir, facts.get("order"), rules.get("order"))
        if others := [n for n, each in frozen.items() if before.get(n, each) != each]:
            raise UsageError(
                f"{run_dir} was trained with another {' and '.join(others)}, whose files have "
                "changed since: restore them, give another name=... for a new run, or "
                f"resume.allow=[{','.join(others)}] to go on with these"
            )
    elif first:
        (run_dir / "metrics.csv").unlink(missing_ok=True)  # of a call without a checkpoint
    return resume


def check_same_order(run_dir: Path, before: object, now: Mapping[str, object] | None) -> None:
    """UsageError where a run with buckets or weighted data sets would go on in another order."""
    if before == now:
        return
    had = before if isinstance(before, dict) else {}
    settings = "data.buckets, data.pixels, and weights and sizes of data.train"
    if had and now and had.get("batch") != now["batch"]:
        settings = f"data.batch_size={had.get('batch')}"
    raise UsageError(
        f"{run_dir} was trained in another order of samples: give the {settings} that it began "
        "with (they are in its config.yaml), or another name=... for a new run"
    )
