"""Weights & Biases: group, name and id of a run; offline if no server answers."""

import netrc
import os
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from ldm.experiments.run_dir import get_wandb_id
from ldm.training.loggers.base import RunLogger
from ldm.utils.files import write_text

WANDB_STEP_KEY = "trainer/global_step"  # Lightning's name; every row of numbers has it
IMAGES_SEEN_KEY = "images_seen"
# W&B tries these in no fixed order, so two must not match the same name.
WANDB_METRIC_AXES = {
    "train/*": WANDB_STEP_KEY,
    "perf/*": WANDB_STEP_KEY,
    IMAGES_SEEN_KEY: WANDB_STEP_KEY,
    "val/*": IMAGES_SEEN_KEY,
    "samples": IMAGES_SEEN_KEY,
}
# Seconds to wait for a server, unless the environment sets them.
WANDB_TIMEOUTS = {"init_timeout": 15.0, "finish_timeout": 60.0}


def wandb_logger(
    *,
    run_dir: Path,
    name: str,
    overrides: list[str],
    project: str = "ldm",
    offline: bool | None = None,
) -> "WandbRun":
    """Returns the run's W&B logger; the run `a/b` is `b` in the group `a`.

    Its tags are the overrides that `b` contains, or all of them.
    offline: None means offline unless there is an API key or WANDB_MODE. `wandb sync` sends an
    offline run from <run_dir>/wandb. With a key but no server that accepts it, the run is offline
    after WANDB_INIT_TIMEOUT (15) seconds.
    """
    if os.path.expanduser("~") == "~":  # W&B does not start without a home directory
        os.environ["HOME"] = "/nonexistent"
    if offline is None and "WANDB_MODE" not in os.environ:
        offline = not has_wandb_key()
    group, _, own = str(name).rpartition("/")
    differing = [text for text in overrides if text in own]  # in a sweep, all of them name a job
    tags = dict.fromkeys(
        text if len(text) <= 64 else f"{text[:61]}..." for text in differing or overrides
    )
    run = {"project": project, "group": group[:128] or None, "name": own[:128], "tags": list(tags)}
    return WandbRun(run_dir, run=run, overrides=overrides, offline=bool(offline))


class WandbRun(WandbLogger, RunLogger):
    """Lightning's logger for a W&B run that starts at its first use and never stops the training.

    A resumed run directory continues its W&B run: the id is in <run_dir>/wandb_id, and the address,
    once a server had the run, in <run_dir>/wandb_url. After a kill some steps are logged twice
    under the same `trainer/global_step`; metrics.csv drops the older ones, W&B cannot.
    """

    def __init__(self, run_dir: Path, *, run: dict, overrides: list[str], offline: bool) -> None:
        super().__init__(save_dir=run_dir, **run)
        self.run_dir, self.run, self.offline = run_dir, run, offline
        self.images_seen: dict[str, object] = {}
        self.has_warned = False
        self.overrides = {key: value for key, _, value in (o.partition("=") for o in overrides)}

    @property
    @rank_zero_experiment
    def experiment(self) -> wandb.Run:
        if self._experiment is not None:
            return self._experiment
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # W&B would wait for a dead server
        run, url_file = None, self.run_dir / "wandb_url"
        if not self.offline:
            try:
                run = self._start("must" if url_file.is_file() else "allow", mode=None)
            except Exception as error:
                print(f"W&B cannot be used: {format_first_line(error)}", flush=True)
                with suppress(Exception, SystemExit):
                    wandb.teardown()  # its process still holds the id of the failed run
        run = self._experiment = run or self._start("allow", mode="offline")
        if run.offline:
            self._print_sync_command("W&B is offline", "", "offline-run-*")
        elif run.url:
            write_text(url_file, f"{run.url}\n")
        run.config.update({"overrides": self.overrides}, allow_val_change=True)
        run.define_metric(WANDB_STEP_KEY)
        for metric, axis in WANDB_METRIC_AXES.items():
            run.define_metric(metric, step_metric=axis, step_sync=True)
        return run

    def _start(self, resume: str, *, mode: str | None) -> wandb.Run:
        settings = wandb.Settings(
            silent=True,
            reinit="finish_previous",  # an earlier job in the same process
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=1.0,  # seconds that a kill may lose
            **{k: v for k, v in WANDB_TIMEOUTS.items() if f"WANDB_{k.upper()}" not in os.environ},
        )
        run = self.run | {"id": get_wandb_id(self.run_dir), "dir": self.run_dir}
        return wandb.init(**run, resume=resume, mode=mode, settings=settings)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, object], step: int | None = None) -> None:
        """Logs a row with the latest images_seen; only the first failure is printed."""
        if IMAGES_SEEN_KEY in metrics:
            self.images_seen = {IMAGES_SEEN_KEY: metrics[IMAGES_SEEN_KEY]}
        try:
            super().log_metrics(self.images_seen | dict(metrics), step)
        except Exception as error:
            if not self.has_warned:
                reason = format_first_line(error)
                print(f"W&B did not take {', '.join(metrics)}: {reason}", flush=True)
            self.has_warned = True

    def finish(self, *, failed: bool) -> None:
        """Closes the run; what a server has not taken in 60 seconds stays on disk."""
        try:
            if self._experiment is not None:
                self._experiment.finish(exit_code=int(failed))
        except Exception as error:
            reason = f"W&B did not take everything ({format_first_line(error)})"
            folders = f"*run-*-{get_wandb_id(self.run_dir)}"
            self._print_sync_command(reason, "--include-online ", folders)

    def _print_sync_command(self, reason: str, option: str, folders: str) -> None:
        where = shlex.quote(f"{self.run_dir}/wandb/")
        print(f"{reason}; `wandb sync {option}{where}{folders}` sends the run later", flush=True)


def format_first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or its type."""
    return (str(error) or type(error).__name__).splitlines()[0]


def has_wandb_key() -> bool:
    """Whether there is a W&B API key in the environment or where `wandb login` writes it."""
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    host = server.partition("://")[2].partition("/")[0] or server
    # wandb's own rule. Without a home directory `~` stays, and no such file exists.
    file = os.path.expanduser(os.environ.get("NETRC", "~/.netrc"))
    found = bool(os.environ.get("WANDB_API_KEY"))
    with suppress(OSError, netrc.NetrcParseError):
        found = found or netrc.netrc(file).authenticators(host) is not None
    return found
