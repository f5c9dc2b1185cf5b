"""Files of a run directory (config.yaml, metrics.csv, result.json), and which process writes them.

runs/<name>/  config.yaml  .hydra/  checkpoints/  samples/  metrics.csv  wandb/  result.json
"""

import csv
import io
import json
import math
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ldm.experiments.former_names import update_key, update_names
from ldm.utils.files import read_json, read_regular_file, write_text
from ldm.utils.plain_yaml import parse_plain_mapping

MAX_CONFIG_BYTES = 2**18  # of a configuration or result, which have a few thousand
MAX_METRICS_BYTES = 2**29  # of metrics.csv; a million rows have some 200 MB
LORA_FILE = "lora.safetensors"  # the adapters of a run with lora.rank
SWEEP_FILE = "sweep.json"  # the settings that the jobs of a sweep share; makes a directory a sweep
# Files that Hydra, the log and a sweep open in a run directory by name.
FIXED_RUN_FILES = (
    *(".hydra", ".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml"),
    *(".lock", "train.log", "output.log", "multirun.yaml"),
)
LOWER_IS_BETTER_PREFIXES = (
    *("loss", "fid", "kid", "cmmd", "fd_"),
    *("data_wait", "eval_share", "memory", "step_ms"),
)
# Settings that may differ between two calls of one run: they change no weights.
CHANGEABLE_SETTINGS = (
    *("name", "direction", "early_stop", "eval", "features", "trainer", "strategy", "logger"),
    *("callbacks", "metrics", "compile", "profile"),
    *("checkpoint", "stop_after_skips", "samples", "resume", "trust", "metric", "validate_first"),
    *("data.workers", "data.on_error", "data.max_skipped", "data.cache", "data.cache_gb"),
    *("data.val_batch_size", "model.checkpointing"),
)


def make_run_stamp() -> str:
    """Returns the name of a run without name=: the launcher's run id, or date and time.

    It is the same in all ranks and restarts of a run; ValueError if torchrun has several and no id.
    """
    if "LDM_RUN_STAMP" not in os.environ:
        launched = os.environ.get("TORCHELASTIC_RUN_ID", "none")
        if launched == "none" and "SLURM_JOB_ID" in os.environ:
            launched = f"slurm-{os.environ['SLURM_JOB_ID']}"
        alone = {"WORLD_SIZE": "1", "TORCHELASTIC_MAX_RESTARTS": "0"}.items()
        is_shared = any(os.environ.get(name, value) != value for name, value in alone)
        if launched == "none" and "TORCHELASTIC_RUN_ID" in os.environ and is_shared:
            raise ValueError(
                "the processes that torchrun starts have no name in common, and each would begin "
                "a run of its own: give name=my-run, or torchrun --rdzv-id=my-run"
            )
        now = time.strftime("%Y-%m-%d_%H-%M-%S")
        os.environ["LDM_RUN_STAMP"] = now if launched == "none" else launched
    return os.environ["LDM_RUN_STAMP"]


def get_launcher_rank() -> int:
    """Returns the rank of this process before torch.distributed knows it; 0 without a launcher."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    return int(next((os.environ[name] for name in names if name in os.environ), 0))


def select_on_first_rank(text: str) -> str | None:
    """Returns `text` in the first process of a run, None in the others."""
    return text if get_launcher_rank() == 0 else None


def get_train_log_path(run_dir: str) -> str:
    """Returns the file of the run's log; the first process alone writes one."""
    return str(Path(run_dir, "train.log")) if get_launcher_rank() == 0 else os.devnull


def infer_metric_direction(metric: str) -> str:
    """Returns minimize or maximize, by the metric's name."""
    leaf = metric.rpartition("/")[2]
    return "minimize" if leaf.startswith(LOWER_IS_BETTER_PREFIXES) else "maximize"


HYDRA_RESOLVERS = {
    "run_stamp": make_run_stamp,
    "if_first": select_on_first_rank,
    "log_file": get_train_log_path,
    "direction": infer_metric_direction,
}


def get_launcher_layout() -> tuple[int, int] | None:
    """Returns (processes per machine, machines) of torchrun or srun; None for one process."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        per_machine = int(os.environ["LOCAL_WORLD_SIZE"])
        return per_machine, int(os.environ["WORLD_SIZE"]) // per_machine
    # Not SLURM_NTASKS, which a batch script has, too.
    if (tasks := int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))) > 1:
        nodes = int(os.environ["SLURM_STEP_NUM_NODES"])
        return tasks // nodes, nodes
    return None


def write_result(run_dir: Path, result: dict) -> None:
    """Replaces result.json."""
    write_text(run_dir / "result.json", json.dumps(result, indent=2) + "\n")


def read_result(run_dir: Path) -> dict:
    """Returns result.json; empty without a file. Raises ValueError if it is damaged."""
    path = run_dir / "result.json"
    if not os.path.lexists(path):
        return {}
    try:
        result = read_json(path, max_bytes=MAX_CONFIG_BYTES)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error})") from error
    if not isinstance(result, dict):
        raise ValueError(f"{path} holds no settings, but {type(result).__name__}")
    return result


def read_yaml_settings(path: Path) -> dict:
    """Returns the settings in a file; empty without a file. Raises ValueError if it is damaged."""
    if not os.path.lexists(path):
        return {}
    try:
        text = read_regular_file(path, max_bytes=MAX_CONFIG_BYTES).decode()
        return update_names(parse_plain_mapping(text))
    except ValueError as error:
        raise ValueError(f"{path} holds no settings: {error}") from error


def read_partial_result(run_dir: Path, metric: str) -> dict:
    """Returns the keys of result.json for a run up to its newest checkpoint; needs no torch."""
    before, ckpt = read_result(run_dir), run_dir / "checkpoints" / "last.ckpt"
    name = ckpt.resolve().name if ckpt.exists() else ""
    steps = int(name.removeprefix("step=")[:8] or 0)
    rows = [row for row in read_metrics(run_dir) if row["step"] <= steps]
    return {
        "metric": metric,
        "value": find_last_value(rows, metric),
        "steps": steps,
        "stopped_early": False,
        "images_seen": int(find_last_value(rows, "images_seen") or 0),
        "checkpoint": f"checkpoints/{name}" if name else None,
        "seconds": before.get("seconds", 0.0),
    }


def is_run_finished(run_dir: Path, steps: int, *, stops: bool) -> bool:
    """Returns whether a run has taken its optimizer steps, or stopped early and still may."""
    result = read_result(run_dir)
    stopped = stops and result.get("stopped_early", False)
    return result.get("status") == "finished" and (result["steps"] >= steps or stopped)


def read_metrics(run_dir: Path, *, tail: int | None = None) -> list[dict[str, float]]:
    """Returns the rows of metrics.csv without empty cells; ValueError if it is damaged.

    tail: of so many bytes at its end.
    """
    path = run_dir / "metrics.csv"
    if not path.is_file():
        if path.exists():
            raise ValueError(f"{path} is no file")
        return []
    with path.open("rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > MAX_METRICS_BYTES:
            raise ValueError(f"{path} has more than {MAX_METRICS_BYTES} bytes, and is not read")
        names = file.readline().decode().rstrip().split(",")
        if tail is not None and size - tail > file.tell():
            file.seek(size - tail)
            file.readline()  # the rest of a line
        lines = file.read().rpartition(b"\n")[0]  # without a line that is being written
    try:
        cells = csv.reader(io.StringIO(lines.decode()))
        rows = [{k: parse_number(v) for k, v in zip(names, row, strict=False)} for row in cells]
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV ({error})") from error
    rows = [{k: v for k, v in row.items() if v is not None} for row in rows]
    return [row for row in rows if abs(row.get("step", math.inf)) < 2**63]


def is_sweep_job(run_dir: Path) -> bool:
    return (run_dir.parent / SWEEP_FILE).is_file()


def parse_number(text: Any) -> float | None:
    """Returns the number in a cell or a setting, None if it holds none."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def read_last_value(run_dir: Path, metric: str) -> float | None:
    """Returns a run's last value of a metric."""
    return find_last_value(read_metrics(run_dir), metric)


def find_last_value(rows: list[dict[str, float]], metric: str) -> float | None:
    """Returns the last value of a metric in these rows."""
    return next((row[metric] for row in reversed(rows) if metric in row), None)


def list_config_changes(
    old: dict, new: dict, default: dict | None = None, prefix: str = ""
) -> list[str]:
    """Returns "key was a, is b" for each setting that two configurations of a run must share.

    A setting that the old configuration lacks may have its default.
    """
    changes, default = [], default or {}
    for key in old | new:
        name, a, b = f"{prefix}{key}", old.get(key), new.get(key)
        is_new = key not in old and key in default and default[key] == b
        if name in CHANGEABLE_SETTINGS or a == b or is_new:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            inner = default.get(key)
            inner = inner if isinstance(inner, dict) else None
            changes += list_config_changes(a, b, inner, f"{name}.")
        else:
            changes.append(f"{name} was {a}, is {b}")
    return changes


def change_concerns(change: str, keys: Iterable[str]) -> bool:
    """Returns whether a line of `list_config_changes` is of one of these settings or groups."""
    changed = change.partition(" was ")[0]
    return any(f"{changed}.".startswith(f"{update_key(key)}.") for key in keys)


def find_run_of_checkpoint(ckpt: Path) -> Path:
    """Returns the run of a checkpoint; the current directory for one from elsewhere."""
    return ckpt.parent.parent if ckpt.parent.name == "checkpoints" else Path()


def make_image_path(ckpt: Path, prompt: str) -> Path:
    """Returns the file for images of a prompt: its letters and digits, so that it stays there."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "picture"
    return Path(os.path.relpath(find_run_of_checkpoint(ckpt) / "samples" / f"{words}.png"))
