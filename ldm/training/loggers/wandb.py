"""Weights & Biases, which never asks and never stops a run: offline where no server takes it."""

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
from ldm.utils.files import write_text

WANDB_STEP_KEY = "trainer/global_step"  # Lightning's name; every row of numbers has it
IMAGES_SEEN_KEY = "images_seen"
# W&B looks through these in no fixed order, so no two may fit one name.
WANDB_METRIC_AXES = {
    "train/*": WANDB_STEP_KEY,
    "perf/*": WANDB_STEP_KEY,
    IMAGES_SEEN_KEY: WANDB_STEP_KEY,
    "val/*": IMAGES_SEEN_KEY,
    "samples": IMAGES_SEEN_KEY,
}
# Seconds to wait for a server, where the environment does not say otherwise.
WANDB_TIMEOUTS = {"init_timeout": 15.0, "finish_timeout": 60.0}


def wandb_logger(
    *,
    run_dir: Path,
    name: str,
    overrides: list[str],
    project: str = "ldm",
    offline: bool | None = None,
) -> "WandbRun":
    """The run's W&B logger; the run `a/b` is `b` in the group `a`, tagged with what `b` names.

    offline: None means where there is neither an API key nor WANDB_MODE. What is logged offline
    lies in <run_dir>/wandb and is sent by `wandb sync`. With a key and no server that takes it,
    the run is offline after WANDB_INIT_TIMEOUT (15) seconds.
    """
    if os.path.expanduser("~") == "~":  # no home directory, without which W&B does not even begin
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


class WandbRun(WandbLogger):
    """Lightning's logger on a W&B run that begins at its first use and never stops the training.

    A resumed run directory continues its W&B run: its id is in <run_dir>/wandb_id, and once a
    server had it, its address is in <run_dir>/wandb_url. After a kill some steps are logged twice,
    under the same `trainer/global_step`; metrics.csv drops the older ones, W&B's history cannot.
    """

    def __init__(self, run_dir: Path, *, run: dict, overrides: list[str], offline: bool) -> None:
        super().__init__(save_dir=run_dir, **run)
        self.run_dir, self.run, self.offline = run_dir, run, offline
        self.seen, self.failed = {}, False
        self.overrides = {key: value for key, _, value in (o.partition("=") for o in overrides)}

    @property
    @rank_zero_experiment
    def experiment(self) -> wandb.Run:
        if self._experiment is not None:
            return self._experiment
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # a dead server is waited for
        run, kept = None, self.run_dir / "wandb_url"
        if not self.offline:
            try:
                run = self._start("must" if kept.is_file() else "allow", mode=None)
            except Exception as error:
                print(f"W&B cannot be used: {format_first_line(error)}", flush=True)
                with suppress(Exception, SystemExit):
                    wandb.teardown()  # its process keeps the id of the run that failed
        run = self._experiment = run or self._start("allow", mode="offline")
        if run.offline:
            self._print_sync_command("W&B is offline", "", "offline-run-*")
        elif run.url:
            write_text(kept, f"{run.url}\n")
        run.config.update({"overrides": self.overrides}, allow_val_change=True)
        run.define_metric(WANDB_STEP_KEY)
        for metric, axis in WANDB_METRIC_AXES.items():
            run.define_metric(metric, step_metric=axis, step_sync=True)
        return run

    def _start(self, resume: str, *, mode: str | None) -> wandb.Run:
        settings = wandb.Settings(
            silent=True,
            reinit="finish_previous",  # of a job before this one, in the same process
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=1.0,  # what a kill may cost, in seconds
            **{k: v for k, v in WANDB_TIMEOUTS.items() if f"WANDB_{k.upper()}" not in os.environ},
        )
        run = self.run | {"id": get_wandb_id(self.run_dir), "dir": self.run_dir}
        return wandb.init(**run, resume=resume, mode=mode, settings=settings)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, object], step: int | None = None) -> None:
        """A row, with the latest images_seen; the first that W&B fails to take is told."""
        self.seen = (
            {IMAGES_SEEN_KEY: metrics[IMAGES_SEEN_KEY]} if IMAGES_SEEN_KEY in metrics else self.seen
        )
        try:
            super().log_metrics(self.seen | dict(metrics), step)
        except Exception as error:
            if not self.failed:
                print(
                    f"W&B did not take {', '.join(metrics)}: {format_first_line(error)}", flush=True
                )
            self.failed = True

    def finish(self, *, failed: bool) -> None:
        """Close the run; what a server has not taken in 60 seconds stays on disk."""
        try:
            if self._experiment is not None:
                self._experiment.finish(exit_code=int(failed))
        except Exception as error:
            what = f"W&B did not take everything ({format_first_line(error)})"
            self._print_sync_command(
                what, "--include-online ", f"*run-*-{get_wandb_id(self.run_dir)}"
            )

    def _print_sync_command(self, what: str, option: str, folders: str) -> None:
        where = shlex.quote(f"{self.run_dir}/wandb/")
        print(f"{what}; `wandb sync {option}{where}{folders}` sends the run later", flush=True)


def format_first_line(error: Exception) -> str:
    """What went wrong, without what W&B has to say beyond."""
    return (str(error) or type(error).__name__).splitlines()[0]


def has_wandb_key() -> bool:
    """Whether a W&B API key is set, in the environment or where `wandb login` puts it."""
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    host = server.partition("://")[2].partition("/")[0] or server
    # As wandb looks it up. Without a home directory `~` stays, and no such file is there.
    file = os.path.expanduser(os.environ.get("NETRC", "~/.netrc"))
    found = bool(os.environ.get("WANDB_API_KEY"))
    with suppress(OSError, netrc.NetrcParseError):
        found = found or netrc.netrc(file).authenticators(host) is not None
    return found
