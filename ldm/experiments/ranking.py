"""What a number of runs are worth beside one another: read from their directories, also mid-run."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from ldm.experiments.former_names import update_names
from ldm.experiments.run_dir import (
    SWEEP_FILE,
    find_last_value,
    parse_number,
    read_metrics,
    read_result,
    read_yaml_settings,
)
from ldm.utils.locks import is_directory_locked
from ldm.utils.text import escape_control_characters, format_csv_cell

# What is shown of each run beside the metric that ranks, as far as it was measured.
RANKING_METRICS = (
    "val/fid",
    "val/fd_",
    "val/clip_score",
    "val/scene_accuracy",
    "val/recall_at_1",
    "val/psnr",
    "val/loss",
)
GENERATION_METRICS = (
    "val/scene_accuracy",
    "val/fid",
    "val/fd_",
    "val/clip_score",
)  # by their pictures
REFERENCE_SUFFIXES = ("_floor", "_real")  # what real pictures get: no weights change it
# Not settings of an experiment, but where and how it was carried out.
INCIDENTAL_SETTINGS = ("name", "direction", "early_stop.run_dir")


MAX_PLOTTED_VALUE = 1e30  # larger numbers are left out of pictures, whose axes overflow


@dataclass(frozen=True)
class RunRecord:
    """A run as its directory tells of it."""

    directory: Path
    state: str  # running, finished, stopped early, preempted, failed, interrupted or waiting
    config: dict
    choices: dict[str, str]  # the option of each group
    result: dict
    rows: list[dict[str, float]]  # of metrics.csv

    def last_value(self, metric: str) -> float | None:
        """The last value of a metric."""
        return find_last_value(self.rows, metric)

    def curve(self, metric: str) -> list[tuple[float, float]]:
        """(images seen, value) at each time that a metric was logged, without what is too large."""
        batch = parse_number((self.config.get("data") or {}).get("batch_size")) or 1
        points = [row for row in self.rows if metric in row]
        found = [(row.get("images_seen", row["step"] * batch), row[metric]) for row in points]
        return [
            (x, y)
            for x, y in found
            if abs(x) < MAX_PLOTTED_VALUE and not abs(y) >= MAX_PLOTTED_VALUE
        ]

    @property
    def step(self) -> int:
        """The last step of which something is known."""
        return int(self.rows[-1]["step"]) if self.rows else 0


def read_run_record(directory: Path) -> RunRecord:
    """The run in a directory, whatever state it is in.

    Raises ValueError and OSError where a file of it does not hold what it should.
    """
    result = read_result(directory)
    about = read_yaml_settings(directory / ".hydra" / "hydra.yaml")
    choices = update_names(_inner(_inner(_inner(about, "hydra"), "runtime"), "choices"))
    config = read_yaml_settings(directory / "config.yaml")
    _inner(config, "data")
    begun = any((directory / name).exists() for name in ("config.yaml", "output.log"))
    if is_directory_locked(directory):
        state = "running"
    elif result.get("stopped_early"):
        state = "stopped early"
    else:
        state = str(result.get("status") or ("interrupted" if begun else "waiting"))
    return RunRecord(
        directory=directory,
        state=state,
        config=config,
        choices={k: str(v) for k, v in choices.items() if not str(k).startswith("hydra/")},
        result=result,
        rows=read_metrics(directory),
    )


def _inner(node: dict, key: str) -> dict:
    """The settings below a key; none where it is not there."""
    found = node.get(key) or {}
    if not isinstance(found, dict):
        raise ValueError(f"{key} holds no settings, but {type(found).__name__}")
    return found


def find_runs(places: Iterable[Path]) -> list[Path]:
    """The runs that are meant: each place itself, or those below it where it is a sweep.

    Raises FileNotFoundError where there is none.
    """
    found: dict[Path, None] = {}
    for place in places:
        is_run = (place / "config.yaml").is_file() or (place / "result.json").is_file()
        if is_run and not (place / SWEEP_FILE).is_file():
            found[place] = None
            continue
        below = {p.parent for n in ("config.yaml", "result.json") for p in place.glob(f"**/{n}")}
        below = {p for p in below if p.name != ".hydra"}
        if not below:
            raise FileNotFoundError(
                f"'{place}' is neither a run nor a folder with runs: give directories that "
                "train.py made, such as runs/my-sweep"
            )
        found |= dict.fromkeys(sorted(below))
    return list(found)


def find_run_differences(compared: Sequence[RunRecord]) -> dict[str, list[str]]:
    """What differs between runs: a group's option, or a single setting; a value for each run.

    Settings that come with a group's option are not told again, and a run without configuration,
    which did not come so far, differs in nothing.
    """
    begun = [bool(run.config) for run in compared]

    def differ(values: list[str]) -> bool:
        return len({value for value, known in zip(values, begun, strict=True) if known}) > 1

    table: dict[str, list[str]] = {}
    for group in sorted({group for run in compared for group in run.choices}):
        values = [run.choices.get(group, "") for run in compared]
        if differ(values):
            table[group] = values
    flat = [dict(_leaves(run.config)) for run in compared]
    for key in dict.fromkeys(key for settings in flat for key in settings):
        values = [str(settings.get(key, "")) for settings in flat]
        told = any(key == group or key.startswith(f"{group}.") for group in table)
        if differ(values) and not told and key not in INCIDENTAL_SETTINGS:
            table[key] = values
    return table


def _leaves(node: dict, prefix: str = "") -> Iterable[tuple[str, object]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def rank_runs(compared: Sequence[RunRecord], metric: str, *, direction: str) -> list[RunRecord]:
    """Best first; failed runs and those without a value come last."""
    sign = 1 if direction == "minimize" else -1

    def place(run: RunRecord) -> tuple:
        value = run.last_value(metric)
        known = value is not None and math.isfinite(value)
        return (run.state == "failed", not known, sign * value if known else 0.0, run.directory)

    return sorted(compared, key=place)


def list_ranking_caveats(compared: Sequence[RunRecord], metric: str) -> list[str]:
    """Why the order might say less than it seems to."""
    weighing = {"scheduler", "objective", "autoencoder", "data", "time_power", "weighting", "loss"}
    differ = weighing & {key.partition(".")[0] for key in find_run_differences(compared)}
    stages = {run.config.get("stage") for run in compared if run.config}
    if len(stages) > 1:
        return [f"These are runs of several stages ({', '.join(sorted(map(str, stages)))})."]
    if differ and metric.startswith(("val/loss", "train/loss")):
        what = ", ".join(sorted(differ))
        each = [collect_logged_metrics([run]) for run in compared if run.rows]
        by = _select_by_prefix(GENERATION_METRICS, set.intersection(*each) if each else set())
        instead = f", or rank by what is painted, as metric={by[0]} does" if by else ""
        return [
            f"A loss weighs the same errors otherwise where {what} differs: look at samples.png"
            f"{instead}."
        ]
    return []


def shorten_run_names(compared: Sequence[RunRecord]) -> list[str]:
    """A short name for each run: its directory below the one that all share."""
    parts = [run.directory.absolute().parts for run in compared]
    shared = 0
    while all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return ["/".join(p[shared:]) for p in parts]


def collect_logged_metrics(compared: Sequence[RunRecord]) -> set[str]:
    """Every metric that any of the runs has logged."""
    return {name for run in compared for row in run.rows for name in row}


def select_ranking_metrics(order: Sequence[RunRecord], *, constant: bool = False) -> list[str]:
    """Those of SHOWN that any of the runs has measured; with what real pictures get, if asked."""
    names = _select_by_prefix(RANKING_METRICS, collect_logged_metrics(order), constant=constant)
    return [n for n in names if not n.startswith("val/loss_t") and not n.endswith("_chance")]


def _select_by_prefix(
    starts: Iterable[str], measured: set[str], *, constant: bool = False
) -> list[str]:
    """The metrics that begin in one of these ways, in this order."""
    found = [name for start in starts for name in sorted(measured) if name.startswith(start)]
    return [name for name in found if constant or not name.endswith(REFERENCE_SUFFIXES)]


def build_ranking_table(
    order: Sequence[RunRecord], metric: str, *, constant: bool = False
) -> tuple[list[str], list[list]]:
    """Columns and rows, in the given order: what differs between the runs and what came of them.

    Cells are text, numbers, or None for what is not known. constant: see `beside`.
    """
    differ = find_run_differences(order)
    metrics = list(dict.fromkeys([metric, *select_ranking_metrics(order, constant=constant)]))
    columns = ["rank", "run", *differ, "state", *metrics, "images_seen", "images/s"]
    columns += ["seconds", "step"]
    rows = []
    for i, (run, name) in enumerate(zip(order, shorten_run_names(order), strict=True)):
        speeds = [row["perf/images_per_s"] for row in run.rows if "perf/images_per_s" in row]
        seen, seconds = run.last_value("images_seen"), run.result.get("seconds")
        rows.append(
            [
                i + 1,
                name,
                *(values[i] for values in differ.values()),
                run.state,
                *map(run.last_value, metrics),
                int(seen) if seen is not None and abs(seen) < 2**63 else None,
                median(speeds) if speeds else None,
                seconds,
                run.step,
            ]
        )
    return columns, rows


def format_markdown_table(columns: Sequence[str], rows: Sequence[Sequence]) -> str:
    """The table as Markdown, numbers to four digits."""
    cells = [list(columns), *([_format_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _format_cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else escape_control_characters(str(value)).replace("|", "\\|")


def format_csv_table(columns: Sequence[str], rows: Sequence[Sequence]) -> str:
    """The table for a program, numbers in full."""
    text = io.StringIO()
    csv.writer(text).writerows(
        [[format_csv_cell(value) for value in row] for row in (columns, *rows)]
    )
    return text.getvalue()
