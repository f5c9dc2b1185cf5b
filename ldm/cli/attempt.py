"""One call of a run: whether it may go on, and what it leaves in result.json, however it ends."""

import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ldm.config.command_line import compose_default_config
from ldm.experiments.run_dir import (
    SWEEP_FILE,
    change_concerns,
    get_launcher_rank,
    list_config_changes,
    read_partial_result,
    read_result,
    read_yaml_settings,
    write_result,
)
from ldm.utils.errors import UsageError, suggest_nearest
from ldm.utils.files import write_text
from ldm.utils.signals import StopSignals


def build_interruptible_job(cfg: DictConfig, run_dir: Path, signals: StopSignals):
    """Build the run's parts; where a signal ends that, result.json says so."""
    first = get_launcher_rank() == 0
    try:
        with signals.exit_on_signal():
            if first:
                write_text(run_dir / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
            from ldm.config.run import (
                build_job,  # torch and Lightning: a typo need not wait for them
            )

            job = build_job(cfg, run_dir, signals)
        signals.at_once = False
        return job
    except SystemExit:
        if signals.received is not None and first:
            signals.at_once = False
            result = {"status": "preempted"} | read_partial_result(run_dir, cfg.metric)
            with suppress(OSError):  # a full disk; what an earlier call has left holds still
                write_result(run_dir, result)
            print_outcome(run_dir, result)
            signals.requeue()
        raise


def print_outcome(run_dir: Path, result: dict) -> None:
    """Print how a run has ended."""
    at = result["checkpoint"] or "none: the same command begins anew"
    print(
        f"{result['status']} at step {result['steps']}; {result['metric']} = {result['value']}; "
        f"newest checkpoint: {at}; more in {run_dir}",
        flush=True,
    )


def train_job(cfg: DictConfig, job, run_dir: Path, signals: StopSignals) -> None:
    """Train, from the newest checkpoint if there is one, and leave result.json, come what may."""
    first = get_launcher_rank() == 0
    spent = read_result(run_dir).get("seconds", 0.0)
    began, ended = time.time(), {"status": "failed"}
    try:
        with signals.exit_on_signal():
            if first:
                (run_dir / "result.json").unlink(missing_ok=True)  # of an earlier, shorter call
                begins = "resumes" if job.resume else "begins"
                print(f"{run_dir} {begins}: {job.describe()}", flush=True)
            if job.trainer.world_size == 1:  # several leave together, where the training begins
                signals.leave_at_once()
            if cfg.validate_first and job.resume is None:
                job.trainer.validate(job.module, datamodule=job.data, verbose=False)
                check_metric_logged(cfg.metric, job.metrics())
            job.trainer.fit(
                job.module, datamodule=job.data, ckpt_path=job.resume, weights_only=True
            )
        job.check_end(run_dir, cfg.metric)
        ended = {"status": "finished"}
    except (KeyboardInterrupt, SystemExit):
        ended = {"status": "preempted"}
        if first:
            signals.requeue()
        raise
    except BaseException as error:
        ended["error"], told_here = job.failed(run_dir, error)
        first = first or told_here
        raise
    finally:
        signals.at_once = False
        seconds = round(spent + time.time() - began, 1)
        if first:
            result = ended | job.outcome(run_dir, cfg.metric) | {"seconds": seconds}
            job.finish(run_dir, cfg.metric, cfg.direction, result)
            print_outcome(run_dir, result)


def check_metric_logged(metric: str, logged: Iterable[str]) -> None:
    """Refuse a metric that the first validation did not measure; raises UsageError."""
    if metric not in logged and not metric.startswith(("train/", "perf/")):
        known = sorted(name for name in logged if "/" in name)
        raise UsageError(
            f"metric={metric} is not measured by this run{suggest_nearest(metric, known)} "
            "There are: "
            f"{', '.join(known)}"
        )


def check_config_unchanged(cfg: DictConfig, run_dir: Path) -> None:
    """Refuse to go on with a run under another configuration; UsageError names what differs."""
    if (run_dir / SWEEP_FILE).is_file():
        raise UsageError(f"{run_dir} is a sweep, and no run: give another name=...")
    before = run_dir / "config.yaml"
    # Where nothing was saved, there is nothing to go on with.
    saved = any((run_dir / "checkpoints").glob("step=*.ckpt"))
    if not before.is_file() or not saved or get_launcher_rank() != 0:
        return
    try:
        old = read_yaml_settings(before)
    except ValueError as error:
        raise UsageError(f"{error}. Move the folder away to begin anew") from error
    new = OmegaConf.to_container(cfg, resolve=True)
    words = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    found = list_config_changes(old, new, compose_default_config("train", words))
    changed = [change for change in found if not change_concerns(change, cfg.resume.allow)]
    if changed:
        keys = ",".join(change.partition(" was ")[0] for change in changed)
        raise UsageError(
            f"{run_dir} was begun with other settings: {'; '.join(changed[:5])}. Give those again "
            f"to go on with it, another name=... to begin anew, or resume.allow=[{keys}] to change "
            "it midway"
        )
