"""Run directories: their names, their notes, and who of several processes may write them.

runs/<name>/  config.yaml  .hydra/  checkpoints/  samples/  metrics.csv  wandb/  result.json
"""

import csv
import io
import json
import math
import os
import re
import secrets
import time
from collections.abc import Iterable
from pathlib import Path

from ldm.experiments.former_names import update_names
from ldm.utils.files import read_regular_file, write_text
from ldm.utils.plain_yaml import parse_plain_mapping

MAX_CONFIG_BYTES = 2**18  # bytes of a configuration or result, of which ours have a few thousand
MAX_METRICS_BYTES = 2**29  # of metrics.csv; a million rows have some 200 MB


def make_run_stamp() -> str:
    """The name of a run that was given none: the same in all its ranks and restarts.

    A launcher's own run id comes first; else date and time, left in the environment for the
    processes that this one starts. ValueError where torchrun has ranks or restarts, and no id.
    """
    if "LDM_RUN_STAMP" not in os.environ:
        launched = os.environ.get("TORCHELASTIC_RUN_ID", "none")
        if launched == "none" and "SLURM_JOB_ID" in os.environ:
            launched = f"slurm-{os.environ['SLURM_JOB_ID']}"
        several = {"WORLD_SIZE": "1", "TORCHELASTIC_MAX_RESTARTS": "0"}.items()
        shared = any(os.environ.get(name, alone) != alone for name, alone in several)
        if launched == "none" and "TORCHELASTIC_RUN_ID" in os.environ and shared:
            raise ValueError(
                "the processes that torchrun starts have no name in common, and each would begin "
                "a run of its own: give name=my-run, or torchrun --rdzv-id=my-run"
            )
        now = time.strftime("%Y-%m-%d_%H-%M-%S")
        os.environ["LDM_RUN_STAMP"] = now if launched == "none" else launched
    return os.environ["LDM_RUN_STAMP"]


def get_launcher_rank() -> int:
    """The rank of this process before torch.distributed knows it; 0 without a launcher."""
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def select_on_first_rank(text: str) -> str | None:
    """`text` in the first process of a run, None in the others."""
    return text if get_launcher_rank() == 0 else None


def get_train_log_path(run_dir: str) -> str:
    """The run's log, of its first process; the others' lines would stand there twice."""
    return str(Path(run_dir, "train.log")) if get_launcher_rank() == 0 else os.devnull


# What Hydra, our log and a sweep open in a directory by its name.
FIXED_RUN_FILES = (
    *(".hydra", ".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml"),
    *(".lock", "train.log", "output.log", "multirun.yaml"),
)
SWEEP_FILE = "sweep.json"  # what the jobs of a sweep share; makes a directory one
LOWER_IS_BETTER_PREFIXES = (
    "loss",
    "fid",
    "kid",
    "cmmd",
    "fd_",
    "data_wait",
    "eval_share",
    "memory",
)


def infer_metric_direction(metric: str) -> str:
    """Whether less or more of a metric is better: minimize or maximize."""
    leaf = metric.rpartition("/")[2]
    return "minimize" if leaf.startswith(LOWER_IS_BETTER_PREFIXES) else "maximize"


HYDRA_RESOLVERS = {
    "run_stamp": make_run_stamp,
    "if_first": select_on_first_rank,
    "log_file": get_train_log_path,
    "direction": infer_metric_direction,
}


def get_launcher_layout() -> tuple[int, int] | None:
    """(processes of this machine, machines) where torchrun or srun has started several processes.

    None where they are still to be started, or there is one.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        here, all_of_them = (int(os.environ[f"{name}WORLD_SIZE"]) for name in ("LOCAL_", ""))
        return here, all_of_them // here
    # Not SLURM_NTASKS, which a batch script has, too.
    if (tasks := int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))) > 1:
        nodes = int(os.environ["SLURM_STEP_NUM_NODES"])
        return tasks // nodes, nodes
    return None


def write_result(run_dir: Path, result: dict) -> None:
    """Replace result.json; keys of section 7 of docs/design.md."""
    write_text(run_dir / "result.json", json.dumps(result, indent=2) + "\n")


def read_result(run_dir: Path) -> dict:
    """What result.json says; empty where there is none. ValueError where it is damaged."""
    return _read_json_object(run_dir / "result.json")


def _read_json_object(path: Path) -> dict:
    if not os.path.lexists(path):
        return {}
    try:
        found = json.loads(read_regular_file(path, max_bytes=MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no settings, but {type(found).__name__}")
    return found


def read_yaml_settings(path: Path) -> dict:
    """The settings in a file; empty where there is none. ValueError where it holds others."""
    if not os.path.lexists(path):
        return {}
    try:
        text = read_regular_file(path, max_bytes=MAX_CONFIG_BYTES).decode()
        return update_names(parse_plain_mapping(text))
    except ValueError as error:
        raise ValueError(f"{path} holds no settings: {error}") from error


def read_partial_result(run_dir: Path, metric: str) -> dict:
    """What had come of a run up to its newest checkpoint, for result.json; without torch."""
    before, last_ckpt = read_result(run_dir), run_dir / "checkpoints" / "last.ckpt"
    name = last_ckpt.resolve().name if last_ckpt.exists() else ""
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
    """Whether a run has come to its end: `steps` optimizer steps, or an early stop, if it `stops`.

    A run that stopped early goes on where it is no longer asked to.
    """
    done = read_result(run_dir)
    early = stops and done.get("stopped_early", False)
    return done.get("status") == "finished" and (done["steps"] >= steps or early)


def read_metrics(run_dir: Path, *, tail: int | None = None) -> list[dict[str, float]]:
    """The rows of metrics.csv, without empty cells; none where there is no such file.

    tail: only those among its last so many bytes, whatever its length.
    """
    path = run_dir / "metrics.csv"
    if not path.is_file():
        if path.exists():
            raise ValueError(f"{path} is no file")
        return []
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size > MAX_METRICS_BYTES:
            raise ValueError(f"{path} has more than {MAX_METRICS_BYTES} bytes, and is not read")
        names = file.readline().decode().rstrip().split(",")
        size = os.fstat(file.fileno()).st_size
        if tail is not None and size - tail > file.tell():
            file.seek(size - tail)
            file.readline()  # cut in two
        whole = file.read().rpartition(b"\n")[0]  # without a line that is being written
        rows = csv.reader(io.StringIO(whole.decode()))
        try:
            cells = [{k: parse_number(v) for k, v in zip(names, row, strict=False)} for row in rows]
        except csv.Error as error:
            raise ValueError(f"{path} is no CSV ({error})") from error
    found = [{k: v for k, v in row.items() if v is not None} for row in cells]
    return [row for row in found if abs(row.get("step", math.inf)) < 2**63]


def is_sweep_job(run_dir: Path) -> bool:
    """Whether a run is one of a sweep."""
    return (run_dir.parent / SWEEP_FILE).is_file()


def parse_number(text: object) -> float | None:
    """A cell's number, None where it holds none."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def read_last_value(run_dir: Path, metric: str) -> float | None:
    """A run's last value of any logged metric."""
    return find_last_value(read_metrics(run_dir), metric)


def find_last_value(rows: list[dict[str, float]], metric: str) -> float | None:
    """The last value of a metric in these rows."""
    return next((row[metric] for row in reversed(rows) if metric in row), None)


# What may differ between two calls of one run: how it is carried out and shown, not what it is.
CHANGEABLE_SETTINGS = (
    "name",
    "direction",
    "early_stop",
    "eval",
    "features",
    "trainer",
    "strategy",
    "logger",
    "checkpoint",
    "stop_after_skips",
    "samples",
    "resume",
    "trust",
    "metric",
    "validate_first",
    "data.workers",
    "data.on_error",
    "data.max_skipped",
    "data.cache",
    "data.cache_gb",
    "data.val_batch_size",
)


def list_config_changes(
    old: dict, new: dict, default: dict | None = None, prefix: str = ""
) -> list[str]:
    """The settings that two configurations of one run must share and do not, with both values.

    A setting that the old one did not know yet may have its default.
    """
    found, default = [], default or {}
    for key in old | new:
        name, a, b = f"{prefix}{key}", old.get(key), new.get(key)
        is_new = key not in old and key in default and default[key] == b
        if name in CHANGEABLE_SETTINGS or a == b or is_new:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            inner = default.get(key)
            found += list_config_changes(
                a, b, inner if isinstance(inner, dict) else None, f"{name}."
            )
        else:
            found.append(f"{name} was {a}, is {b}")
    return found


def change_concerns(change: str, keys: Iterable[str]) -> bool:
    """Whether one of `changes` is about one of these settings, or what belongs to it."""
    key = change.partition(" was ")[0]
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in keys)


def find_run_of_checkpoint(ckpt: Path) -> Path:
    """The run that a checkpoint belongs to; for one from elsewhere, the current directory."""
    return ckpt.parent.parent if ckpt.parent.name == "checkpoints" else Path()


def make_image_path(ckpt: Path, prompt: str) -> Path:
    """A name for pictures of a prompt, in the run that the checkpoint belongs to.

    Made of the prompt's letters and digits alone, so that no prompt leads out of the directory.
    """
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "picture"
    return Path(os.path.relpath(find_run_of_checkpoint(ckpt) / "samples" / f"{words}.png"))


def get_wandb_id(run_dir: Path) -> str:
    """The W&B id of this run directory, made at the first call and kept in it."""
    path = run_dir / "wandb_id"
    if not path.is_file():
        run_dir.mkdir(parents=True, exist_ok=True)
        write_text(path, secrets.token_hex(4) + "\n")
    return path.read_text().strip()
