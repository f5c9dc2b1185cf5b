"""Weights & Biases: names, tags and id of a run; offline if no server answers."""

import netrc
import os
import secrets
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from ldm.training.loggers.base import RunLogger, format_first_line, keep_training, split_run_name
from ldm.training.loggers.run_ids import forget_copied_ids, read_run_id, write_run_id
from ldm.utils.files import write_text

WANDB_STEP_KEY = "trainer/global_step"  # Lightning's name; every row of numbers has it
IMAGES_SEEN_KEY = "images_seen"
# W&B tries these in no fixed order, so two must not match the same name.
WANDB_METRIC_AXES = {
    "train/*": WANDB_STEP_KEY,
    "perf/*": WANDB_STEP_KEY,
    IMAGES_SEEN_KEY: WANDB_STEP_KEY,
    "val/*": IMAGES_SEEN_KEY,
    "eval/*": WANDB_STEP_KEY,
    "samples": IMAGES_SEEN_KEY,
}
# Seconds to wait for a server, unless the environment sets them.
WANDB_TIMEOUTS = {"init_timeout": 15.0, "finish_timeout": 60.0}
WANDB_MODES = ("online", "offline", "disabled")


def wandb_logger(
    *,
    run_dir: Path,
    name: str,
    overrides: Sequence[str],
    entity: str | None = None,
    project: str | None = None,
    group: str | None = None,
    job_type: str | None = None,
    tags: Sequence[str] | None = None,
    notes: str | None = None,
    mode: str | None = None,
    artifact: str | None = None,
) -> "WandbRun":
    """Returns the run's W&B logger; the run `a/b` is `b` in the group `a`.

    A setting that is null is left to its variable WANDB_ENTITY, WANDB_PROJECT, WANDB_RUN_GROUP,
    WANDB_JOB_TYPE, WANDB_TAGS, WANDB_NOTES or WANDB_MODE, then to W&B, except that the project is
    `ldm` and that a run without an API key is offline. What a sweep varies is added to the tags.
    artifact: "best" logs the best checkpoint as an artifact by reference, where the run ends.
    Raises ValueError for a mode or an artifact that does not exist, and for a damaged wandb_id.
    """
    if mode not in (None, *WANDB_MODES):
        raise ValueError(f"logger.wandb.mode={mode} is none of {', '.join(WANDB_MODES)}")
    if artifact not in (None, "best"):
        raise ValueError(f"logger.wandb.artifact={artifact} is neither best nor null")
    if (run_dir / "wandb_id").is_file():
        read_run_id(run_dir / "wandb_id")
    if os.path.expanduser("~") == "~":  # W&B does not start without a home directory
        os.environ["HOME"] = "/nonexistent"
    mode = mode or os.environ.get("WANDB_MODE") or (None if has_wandb_key() else "offline")
    sweep, job, varied = split_run_name(name, overrides)
    group = group or os.environ.get("WANDB_RUN_GROUP") or sweep[:128]
    tags = tags or [tag for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag]
    tags = [tags] if isinstance(tags, str) else tags
    run = {
        "entity": entity,
        "project": project or os.environ.get("WANDB_PROJECT") or "ldm",
        "group": group or None,
        "job_type": job_type,
        "name": job[:128],
        "tags": list(dict.fromkeys(shorten_tag(tag) for tag in (*varied, *tags))) or None,
        "notes": notes,
    }
    return WandbRun(run_dir, run=run, overrides=overrides, mode=mode, artifact=artifact)


class WandbRun(WandbLogger, RunLogger):
    """Lightning's logger for a W&B run that starts at its first use and never stops the training.

    A resumed run directory continues its W&B run: the id is in <run_dir>/wandb_id, and the address,
    once a server had the run, in <run_dir>/wandb_url. With a key but no server that accepts it, the
    run is offline after WANDB_INIT_TIMEOUT (15) seconds. `wandb sync` sends an offline run from
    <run_dir>/wandb. After a kill some steps are logged twice under the same `trainer/global_step`;
    metrics.csv drops the older ones, W&B cannot.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        run: dict,
        overrides: Sequence[str],
        mode: str | None,
        artifact: str | None = None,
    ) -> None:
        super().__init__(save_dir=run_dir, **run)
        self.run_dir, self.run, self.mode, self.artifact = run_dir, run, mode, artifact
        self.images_seen: dict[str, object] = {}
        self.overrides = {key: value for key, _, value in (o.partition("=") for o in overrides)}

    @property
    @rank_zero_experiment
    def experiment(self) -> wandb.Run:
        if self._experiment is not None:
            return self._experiment
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # W&B would wait for a dead server
        run, url_file = None, self.run_dir / "wandb_url"
        forget_copied_ids(self.run_dir)
        if self.mode != "offline":
            try:
                run = self._start("must" if url_file.is_file() else "allow", mode=self.mode)
            except Exception as error:
                print(f"W&B cannot be used: {format_first_line(error)}", flush=True)
                with suppress(Exception, SystemExit):
                    wandb.teardown()  # its process still holds the id of the failed run
        run = self._experiment = run or self._start("allow", mode="offline")
        if run.offline:
            self._print_sync_command("W&B is offline", "", "offline-run-*")
        elif run.url:
            write_text(url_file, f"{run.url}\n")
        if self.overrides:
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
    @keep_training("W&B")
    def log_metrics(self, metrics: Mapping[str, object], step: int | None = None) -> None:
        """Logs a row with the latest images_seen."""
        if IMAGES_SEEN_KEY in metrics:
            self.images_seen = {IMAGES_SEEN_KEY: metrics[IMAGES_SEEN_KEY]}
        super().log_metrics(self.images_seen | dict(metrics), step)

    @rank_zero_only
    @keep_training("W&B")
    def alert(self, title: str, text: str) -> None:
        level = wandb.AlertLevel.WARN if "preempted" in title else wandb.AlertLevel.ERROR
        self.experiment.alert(title, text, level)

    @keep_training("W&B")
    def log_best_checkpoint(self, path: Path) -> None:
        """Logs a checkpoint as an artifact, which refers to the file and does not upload it."""
        artifact = wandb.Artifact(f"checkpoint-{get_wandb_id(self.run_dir)}", type="model")
        artifact.add_reference(f"file://{path.resolve()}")
        self.experiment.log_artifact(artifact, aliases=["best", path.resolve().stem])

    def finish(self, *, status: str) -> None:
        """Closes the run; what a server has not taken in 60 seconds stays on disk."""
        if self._experiment is None:
            return
        best = self.run_dir / "checkpoints" / "best.ckpt"
        if self.artifact == "best" and best.is_file():
            self.log_best_checkpoint(best)
        try:
            self._experiment.finish(exit_code=int(status == "failed"))
        except Exception as error:
            reason = f"W&B did not take everything ({format_first_line(error)})"
            folders = f"*run-*-{get_wandb_id(self.run_dir)}"
            self._print_sync_command(reason, "--include-online ", folders)

    def _print_sync_command(self, reason: str, option: str, folders: str) -> None:
        where = shlex.quote(f"{self.run_dir}/wandb/")
        print(f"{reason}; `wandb sync {option}{where}{folders}` sends the run later", flush=True)


def get_wandb_id(run_dir: Path) -> str:
    """Returns the W&B id of a run directory; the first call makes it."""
    path = run_dir / "wandb_id"
    if not path.is_file():
        write_run_id(path, secrets.token_hex(4))
    return read_run_id(path)


def shorten_tag(text: str) -> str:
    """Returns a tag of at most 64 characters, which W&B takes."""
    return text if len(text) <= 64 else f"{text[:61]}..."


def has_wandb_key() -> bool:
    """Returns whether a W&B API key is in the environment or where `wandb login` writes it."""
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    host = server.partition("://")[2].partition("/")[0] or server
    # wandb's own rule. Without a home directory `~` stays, and no such file exists.
    file = os.path.expanduser(os.environ.get("NETRC", "~/.netrc"))
    found = bool(os.environ.get("WANDB_API_KEY"))
    with suppress(OSError, netrc.NetrcParseError):
        found = found or netrc.netrc(file).authenticators(host) is not None
    return found
