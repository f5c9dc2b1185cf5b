"""One call of a run: whether it may go on, and what it leaves in result.json, however it ends."""

import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ldm.config import command_line
from ldm.config.suggestions import nearest
from ldm.experiments import run_dir as runs
from ldm.utils.errors import UsageError
from ldm.utils.files import write_text
from ldm.utils.signals import Signals


def put_together(cfg: DictConfig, run_dir: Path, signals: Signals):
    """Build the run's parts; where a signal ends that, result.json says so."""
    first = runs.rank() == 0
    try:
        with signals.obey():
            if first:
                write_text(run_dir / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
            from ldm.config.run import build  # torch and Lightning: a typo need not wait for them

            job = build(cfg, run_dir, signals)
        signals.at_once = False
        return job
    except SystemExit:
        if signals.received is not None and first:
            signals.at_once = False
            result = {"status": "preempted"} | runs.so_far(run_dir, cfg.metric)
            with suppress(OSError):  # a full disk; what an earlier call has left holds still
                runs.write_result(run_dir, result)
            tell(run_dir, result)
            signals.requeue()
        raise


def tell(run_dir: Path, result: dict) -> None:
    """Print how a run has ended."""
    at = result["checkpoint"] or "none: the same command begins anew"
    print(
        f"{result['status']} at step {result['steps']}; {result['metric']} = {result['value']}; "
        f"newest checkpoint: {at}; more in {run_dir}",
        flush=True,
    )


def fit(cfg: DictConfig, job, run_dir: Path, signals: Signals) -> None:
    """Train, from the newest checkpoint if there is one, and leave result.json, come what may."""
    first = runs.rank() == 0
    spent = runs.read_result(run_dir).get("seconds", 0.0)
    began, ended = time.time(), {"status": "failed"}
    try:
        with signals.obey():
            if first:
                (run_dir / "result.json").unlink(missing_ok=True)  # of an earlier, shorter call
                begins = "resumes" if job.resume else "begins"
                print(f"{run_dir} {begins}: {job.describe()}", flush=True)
            if job.trainer.world_size == 1:  # several leave together, where the training begins
                signals.leave_at_once()
            if cfg.validate_first and job.resume is None:
                job.trainer.validate(job.module, datamodule=job.data, verbose=False)
                check_metric(cfg.metric, job.metrics())
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
            tell(run_dir, result)


def check_metric(metric: str, logged: Iterable[str]) -> None:
    """Refuse a metric that the first validation did not measure; raises UsageError."""
    if metric not in logged and not metric.startswith(("train/", "perf/")):
        known = sorted(name for name in logged if "/" in name)
        raise UsageError(
            f"metric={metric} is not measured by this run{nearest(metric, known)} There are: "
            f"{', '.join(known)}"
        )


def check_unchanged(cfg: DictConfig, run_dir: Path) -> None:
    """Refuse to go on with a run under another configuration; UsageError names what differs."""
    if (run_dir / runs.SWEEP).is_file():
        raise UsageError(f"{run_dir} is a sweep, and no run: give another name=...")
    before = run_dir / "config.yaml"
    # Where nothing was saved, there is nothing to go on with.
    saved = any((run_dir / "checkpoints").glob("step=*.ckpt"))
    if not before.is_file() or not saved or runs.rank() != 0:
        return
    try:
        old = runs.read_yaml(before)
    except ValueError as error:
        raise UsageError(f"{error}. Move the folder away to begin anew") from error
    new = OmegaConf.to_container(cfg, resolve=True)
    words = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    found = runs.changes(old, new, command_line.default("train", words))
    changed = [change for change in found if not runs.concerns(change, cfg.resume.allow)]
    if changed:
        keys = ",".join(change.partition(" was ")[0] for change in changed)
        raise UsageError(
            f"{run_dir} was begun with other settings: {'; '.join(changed[:5])}. Give those again "
            f"to go on with it, another name=... to begin anew, or resume.allow=[{keys}] to change "
            "it midway"
        )
