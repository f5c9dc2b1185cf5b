"""One training run in its directory: locked, checked against its beginning, trained or resumed."""

import os
import time
from collections.abc import Iterable
from contextlib import closing, nullcontext, suppress
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ldm.config.adoption import adopt_published_groups
from ldm.config.cache_settings import check_cache_settings
from ldm.config.command_line import convert_to_usage_errors
from ldm.config.composition import compose_default_config, list_task_words
from ldm.config.reserved_settings import ADAMW_8BIT_TARGET, MUON_TARGET
from ldm.experiments.former_names import FORMER_RNG, get_rng, update_names
from ldm.experiments.run_dir import (
    LORA_FILE,
    SWEEP_FILE,
    change_concerns,
    get_launcher_rank,
    is_run_finished,
    list_config_changes,
    read_last_value,
    read_partial_result,
    read_result,
    read_yaml_settings,
    write_result,
)
from ldm.utils.errors import UsageError, format_program, suggest_nearest
from ldm.utils.files import write_text
from ldm.utils.locks import lock_directory
from ldm.utils.plain_yaml import parse_plain_mapping
from ldm.utils.signals import StopSignals


def train_run(cfg: DictConfig, run_dir: Path, signals: StopSignals) -> dict:
    """Trains a run, or resumes it, and returns its result.json; SystemExit after a stop signal."""
    # Children and other machines respect the lock; several ranks share that of the first.
    with convert_to_usage_errors():
        lock = closing(lock_directory(run_dir)) if get_launcher_rank() == 0 else nullcontext()
    with lock:
        with convert_to_usage_errors():
            keep_former_rng(cfg, run_dir)
            keep_former_precision(cfg, run_dir)
            keep_former_shift(cfg, run_dir)
            adopted = adopt_published_groups(cfg, run_dir)
            check_cache_settings(cfg)
            check_config_unchanged(cfg, run_dir)
            if is_run_finished(run_dir, cfg.trainer.max_steps, stops=bool(cfg.early_stop)):
                value = f"{cfg.metric} = {read_last_value(run_dir, cfg.metric)}"
                print(
                    f"{run_dir} is finished: {value}. Raise trainer.max_steps to go on, or choose "
                    "another name"
                )
                return read_result(run_dir)
            if adopted is not None and get_launcher_rank() == 0:
                print(adopted, flush=True)
            from ldm.config.training_checks import check_before_imports  # numpy, fsspec

            check_before_imports(cfg, run_dir)
            job = build_interruptible_job(cfg, run_dir, signals)
        return train_job(cfg, job, run_dir, signals)


def keep_former_rng(cfg: DictConfig, run_dir: Path) -> None:
    """Gives a resumed run the random numbers of torch if it began with them; one line says so."""
    settings = read_former_settings(run_dir)
    began = None if settings is None else get_rng(settings)
    if began == FORMER_RNG and not change_concerns(f"rng was {began}", cfg.resume.allow):
        cfg.rng = began
    if cfg.rng == FORMER_RNG and get_launcher_rank() == 0:
        how = "keeps" if began == FORMER_RNG else "begins with"
        print(f"{run_dir} {how} the random numbers of torch (rng=torch)", flush=True)


def keep_former_precision(cfg: DictConfig, run_dir: Path) -> None:
    """Gives a resumed run with `trainer.precision=auto` the precision that it began with."""
    settings = read_former_settings(run_dir)
    if settings is not None and cfg.trainer.get("precision") == "auto":
        cfg.trainer.precision = (settings.get("trainer") or {}).get("precision", "32-true")


def keep_former_shift(cfg: DictConfig, run_dir: Path) -> None:
    """Gives a resumed run with `scheduler.shift=auto` the number that it began with; says so."""
    settings = read_former_settings(run_dir)
    before = ((settings or {}).get("scheduler") or {}).get("shift")
    if cfg.scheduler.get("shift") == "auto" and before is not None:
        cfg.scheduler.shift = before
        if get_launcher_rank() == 0:
            print(f"{run_dir} keeps scheduler.shift={before:.4g}", flush=True)


def read_former_settings(run_dir: Path) -> dict | None:
    """The configuration that a run with a checkpoint began with; None for any other run."""
    file, folder = run_dir / "config.yaml", run_dir / "checkpoints"
    if not any(folder.glob("step=*.ckpt")):
        return None
    if not os.path.lexists(file):  # it was lost, and the newest checkpoint has it as well
        from ldm.utils.checkpoint_file import find_newest_checkpoint, read_unverified_checkpoint

        payload = read_unverified_checkpoint(find_newest_checkpoint(folder))
        return update_names(parse_plain_mapping(payload["ldm"].get("config", "{}")))
    with suppress(ValueError, OSError):  # the check of all settings reports it
        return read_yaml_settings(file) or None
    return None


def check_config_unchanged(cfg: DictConfig, run_dir: Path) -> None:
    """Refuses to resume a run under another configuration; UsageError names what differs."""
    if (run_dir / SWEEP_FILE).is_file():
        raise UsageError(f"{run_dir} is a sweep, and no run: give another name=...")
    file = run_dir / "config.yaml"
    # Without a checkpoint there is nothing to resume.
    saved = any((run_dir / "checkpoints").glob("step=*.ckpt"))
    if not saved or get_launcher_rank() != 0:
        return
    try:
        old = read_yaml_settings(file) if file.is_file() else read_former_settings(run_dir)
    except ValueError as error:
        raise UsageError(f"{error}. Move the folder away to begin anew") from error
    if old is None:
        return
    old["rng"], new = get_rng(old), OmegaConf.to_container(cfg, resolve=True)
    default = compose_default_config("train", list_task_words())
    changes = list_config_changes(old, new, default)
    check_optimizer_readable(changes, run_dir)
    changes = [change for change in changes if not change_concerns(change, cfg.resume.allow)]
    if changes:
        keys = ",".join(change.partition(" was ")[0] for change in changes)
        raise UsageError(
            f"{run_dir} was started with other settings: {'; '.join(changes[:5])}. Give those "
            "again to continue it, another name=... for a new run, or "
            f"resume.allow=[{keys}] to change them in this one"
        )


def check_optimizer_readable(changes: Iterable[str], run_dir: Path) -> None:
    """UsageError for a change from or to an optimizer whose moments no other optimizer reads."""
    for change in changes:
        is_of_optimizer = change.startswith("optimizer._target_ was ")
        if is_of_optimizer and (ADAMW_8BIT_TARGET in change or MUON_TARGET in change):
            raise UsageError(
                f"{run_dir}: {change}, and neither reads the other's moments: give the optimizer "
                f"that it began with, or init={run_dir} name=... for a new run with its weights"
            )


def build_interruptible_job(cfg: DictConfig, run_dir: Path, signals: StopSignals):
    """Builds the run; where a signal ends that, result.json says so."""
    first = get_launcher_rank() == 0
    try:
        with signals.exit_on_signal():
            settings = OmegaConf.to_yaml(cfg, resolve=True)
            if first:
                write_text(run_dir / "config.yaml", settings)
            from ldm.config.run import build_job  # torch: a typo need not wait for it

            job = build_job(cfg, run_dir, signals)
            chosen = OmegaConf.to_yaml(cfg, resolve=True)  # numbers for "auto"
            if first and chosen != settings:
                write_text(run_dir / "config.yaml", chosen)
        signals.at_once = False
        return job
    except SystemExit:
        if signals.received is not None and first:
            signals.at_once = False
            result = {"status": "preempted"} | read_partial_result(run_dir, cfg.metric)
            with suppress(OSError):  # a full disk; the files of an earlier call are still valid
                write_result(run_dir, result)
            print_outcome(run_dir, result)
            signals.requeue()
        raise


def train_job(cfg: DictConfig, job, run_dir: Path, signals: StopSignals) -> dict:
    """Trains, from the newest checkpoint if there is one; writes result.json however it ends."""
    first = get_launcher_rank() == 0
    spent = read_result(run_dir).get("seconds", 0.0)
    start, end = time.time(), {"status": "failed"}
    try:
        with signals.exit_on_signal():
            if first:
                (run_dir / "result.json").unlink(missing_ok=True)  # of an earlier, shorter call
                print(f"{run_dir} {job.describe()}", flush=True)
            if job.trainer.world_size == 1:  # several leave together, where the training begins
                signals.leave_at_once()
            if cfg.validate_first and job.resume is None:
                job.trainer.validate(job.module, datamodule=job.data, verbose=False)
                check_metric_logged(cfg.metric, job.metrics())
            job.trainer.fit(
                job.module, datamodule=job.data, ckpt_path=job.resume, weights_only=True
            )
        job.check_end(run_dir, cfg.metric)
        end = {"status": "finished"}
    except (KeyboardInterrupt, SystemExit):
        end = {"status": "preempted"}
        if first:
            signals.requeue()
        raise
    except BaseException as error:
        end["error"], reports = job.failed(run_dir, error)
        first = first or reports
        raise
    finally:
        signals.at_once = False
        seconds = round(spent + time.time() - start, 1)
        if first:
            result = end | job.outcome(run_dir, cfg.metric) | {"seconds": seconds}
            job.finish(run_dir, cfg.metric, cfg.direction, result)
            print_outcome(run_dir, result)
            if cfg.lora.rank and end["status"] == "finished":
                print_lora_use(cfg.init, run_dir / LORA_FILE)
    return result if first else end


def print_lora_use(base: str, file: Path) -> None:
    """Prints how to sample with the file of a LoRA run, if a full disk did not prevent it."""
    if file.is_file():
        how = f"{format_program('sample')} ckpt={base} lora=[{file}] prompt=..."
        print(f"the adapters are {file}: {how}", flush=True)


def check_metric_logged(metric: str, logged: Iterable[str]) -> None:
    """UsageError for a metric that the first validation did not measure."""
    if metric not in logged and not metric.startswith(("train/", "perf/")):
        known = sorted(name for name in logged if "/" in name)
        raise UsageError(
            f"metric={metric} is not measured by this run{suggest_nearest(metric, known) or '.'} "
            f"There are: {', '.join(known)}"
        )


def print_outcome(run_dir: Path, result: dict) -> None:
    """Prints how a run ended."""
    newest = result["checkpoint"] or "none: the same command begins anew"
    print(
        f"{result['status']} at step {result['steps']}; {result['metric']} = {result['value']}; "
        f"newest checkpoint: {newest}; more in {run_dir}",
        flush=True,
    )
