"""A ranking of runs, read from their directories at any time: what differs, and the metrics."""

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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
from ldm.utils.errors import UsageError
from ldm.utils.locks import is_directory_locked
from ldm.utils.text import escape_control_characters, format_csv_cell

GENERATION_METRICS = ("val/scene_accuracy", "val/fid", "val/fd_", "val/clip_score")  # of images
# Columns of a ranking, next to the metric that ranks.
RANKING_METRICS = (
    *("val/fid", "val/fd_", "val/clip_score", "val/scene_accuracy", "val/recall_at_1"),
    *("val/psnr", "val/loss"),
)
REFERENCE_SUFFIXES = ("_floor", "_real")  # values of real images, the same for all weights
# Settings that change a loss for the same errors.
LOSS_SETTINGS = {"scheduler", "objective", "autoencoder", "data", "time_power", "weighting", "loss"}
# They say nothing of an experiment.
INCIDENTAL_SETTINGS = ("name", "direction", "early_stop.run_dir", "trust")
MAX_PLOTTED_VALUE = 1e30  # the axes of a plot overflow above it


@dataclass(frozen=True)
class RunRecord:
    """A run as its directory describes it."""

    directory: Path
    state: str  # running, finished, stopped early, preempted, failed, interrupted or waiting
    config: dict
    choices: dict[str, str]  # the option of each group
    result: dict
    rows: list[dict[str, float]]  # of metrics.csv

    def last_value(self, metric: str) -> float | None:
        return find_last_value(self.rows, metric)

    def curve(self, metric: str) -> list[tuple[float, float]]:
        """Returns (images seen, value) at each time that a metric was logged."""
        batch = parse_number((self.config.get("data") or {}).get("batch_size")) or 1
        rows = [row for row in self.rows if metric in row]
        points = [(row.get("images_seen", row["step"] * batch), row[metric]) for row in rows]
        limit = MAX_PLOTTED_VALUE
        return [(x, y) for x, y in points if abs(x) < limit and not abs(y) >= limit]

    @property
    def step(self) -> int:
        return int(self.rows[-1]["step"]) if self.rows else 0


def read_run_record(directory: Path) -> RunRecord:
    """Returns the run in a directory; ValueError or OSError if one of its files is damaged."""
    result = read_result(directory)
    node = read_yaml_settings(directory / ".hydra" / "hydra.yaml")
    for key in ("hydra", "runtime", "choices"):
        node = _read_node(node, key)
    config = read_yaml_settings(directory / "config.yaml")
    _read_node(config, "data")
    began = any((directory / name).exists() for name in ("config.yaml", "output.log"))
    if is_directory_locked(directory):
        state = "running"
    elif result.get("stopped_early"):
        state = "stopped early"
    else:
        state = str(result.get("status") or ("interrupted" if began else "waiting"))
    choices = {k: str(v) for k, v in update_names(node).items() if not str(k).startswith("hydra/")}
    return RunRecord(directory, state, config, choices, result, read_metrics(directory))


def _read_node(settings: dict, key: str) -> dict:
    node = settings.get(key) or {}
    if not isinstance(node, dict):
        raise ValueError(f"{key} holds no settings, but {type(node).__name__}")
    return node


def find_runs(places: Iterable[Path]) -> list[Path]:
    """Returns each place that is a run, and the runs below each that is a sweep or a folder."""
    runs: dict[Path, None] = {}
    for place in places:
        is_run = (place / "config.yaml").is_file() or (place / "result.json").is_file()
        if is_run and not (place / SWEEP_FILE).is_file():
            runs[place] = None
            continue
        below = {p.parent for n in ("config.yaml", "result.json") for p in place.glob(f"**/{n}")}
        below = {p for p in below if p.name != ".hydra"}
        if not below:
            raise UsageError(
                f"'{place}' is neither a run nor a folder with runs: give directories that "
                "train.py made, such as runs/my-sweep"
            )
        runs |= dict.fromkeys(sorted(below))
    return list(runs)


def find_run_differences(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Returns what differs between runs: a group's option, or a setting; a value for each run.

    Settings of a group whose option differs are left out; runs without configuration do not count.
    """
    began = [bool(run.config) for run in runs]

    def differ(values: list[str]) -> bool:
        return len({value for value, known in zip(values, began, strict=True) if known}) > 1

    table: dict[str, list[str]] = {}
    for group in sorted({group for run in runs for group in run.choices}):
        values = [run.choices.get(group, "") for run in runs]
        if differ(values):
            table[group] = values
    flat = [dict(iterate_leaves(run.config)) for run in runs]
    for key in dict.fromkeys(key for settings in flat for key in settings):
        values = [str(settings.get(key, "")) for settings in flat]
        covered = any(key == group or key.startswith(f"{group}.") for group in table)
        if differ(values) and not covered and key not in INCIDENTAL_SETTINGS:
            table[key] = values
    return table


def iterate_leaves(node: Mapping, prefix: str = "") -> Iterable[tuple[str, object]]:
    """Yields each setting with its whole name, such as model.channels."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from iterate_leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def rank_runs(runs: Sequence[RunRecord], metric: str, *, direction: str) -> list[RunRecord]:
    """Returns the runs, best first; failed ones and those without a value come last."""
    sign = 1 if direction == "minimize" else -1

    def sort_key(run: RunRecord) -> tuple:
        value = run.last_value(metric)
        known = value is not None and math.isfinite(value)
        return (run.state == "failed", not known, sign * value if known else 0.0, run.directory)

    return sorted(runs, key=sort_key)


def select_ranking_metric(runs: Sequence[RunRecord]) -> str:
    """Returns the metric of most runs, but scene accuracy for the loss if all have measured it."""
    metrics = [run.config.get("metric") for run in runs]
    counts = Counter(metric for metric in metrics if isinstance(metric, str))
    metric = counts.most_common(1)[0][0] if counts else "val/loss"
    each = [collect_logged_metrics([run]) for run in runs if run.rows]
    has_accuracy = bool(each) and all("val/scene_accuracy" in names for names in each)
    return "val/scene_accuracy" if metric == "val/loss" and has_accuracy else metric


def list_ranking_caveats(runs: Sequence[RunRecord], metric: str) -> list[str]:
    """Returns why the ranking may mislead."""
    stages = {run.config.get("stage") for run in runs if run.config}
    if len(stages) > 1:
        return [f"These are runs of several stages ({', '.join(sorted(map(str, stages)))})."]
    differ = LOSS_SETTINGS & {key.partition(".")[0] for key in find_run_differences(runs)}
    if not differ or not metric.startswith(("val/loss", "train/loss")):
        return []
    each = [collect_logged_metrics([run]) for run in runs if run.rows]
    names = _select_by_prefix(GENERATION_METRICS, set.intersection(*each) if each else set())
    instead = f", or rank by the generated images, as metric={names[0]} does" if names else ""
    what = ", ".join(sorted(differ))
    return [
        f"Runs with another {what} weight errors differently in {metric}, which does not compare "
        f"them: look at the samples{instead}."
    ]


def shorten_run_names(runs: Sequence[RunRecord]) -> list[str]:
    """Returns a short name for each run: its directory below the one that all share."""
    parts = [run.directory.absolute().parts for run in runs]
    shared = 0
    while all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return ["/".join(p[shared:]) for p in parts]


def collect_logged_metrics(runs: Sequence[RunRecord]) -> set[str]:
    return {name for run in runs for row in run.rows for name in row}


def select_ranking_metrics(runs: Sequence[RunRecord], *, constant: bool = False) -> list[str]:
    """Returns the RANKING_METRICS that a run has logged; constant: with those of real images."""
    names = _select_by_prefix(RANKING_METRICS, collect_logged_metrics(runs), constant=constant)
    return [n for n in names if not n.startswith("val/loss_t") and not n.endswith("_chance")]


def _select_by_prefix(
    prefixes: Iterable[str], metrics: set[str], *, constant: bool = False
) -> list[str]:
    names = [name for prefix in prefixes for name in sorted(metrics) if name.startswith(prefix)]
    return [name for name in names if constant or not name.endswith(REFERENCE_SUFFIXES)]


def build_ranking_table(
    runs: Sequence[RunRecord], metric: str, *, constant: bool = False
) -> tuple[list[str], list[list]]:
    """Returns columns and rows, in the order of the runs: what differs, and the metrics.

    constant: with the metrics of real images.
    """
    differ = find_run_differences(runs)
    metrics = list(dict.fromkeys([metric, *select_ranking_metrics(runs, constant=constant)]))
    columns = ["rank", "run", *differ, "state", *metrics, "images_seen", "images/s"]
    columns += ["seconds", "step"]
    rows = []
    for i, (run, name) in enumerate(zip(runs, shorten_run_names(runs), strict=True)):
        speeds = [row["perf/images_per_s"] for row in run.rows if "perf/images_per_s" in row]
        images = run.last_value("images_seen")
        row: list[object] = [i + 1, name, *(values[i] for values in differ.values()), run.state]
        row += map(run.last_value, metrics)
        row.append(int(images) if images is not None and abs(images) < 2**63 else None)
        row += [median(speeds) if speeds else None, run.result.get("seconds"), run.step]
        rows.append(row)
    return columns, rows


def format_markdown_table(columns: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Returns the table as Markdown, numbers to four digits."""
    cells = [list(columns), *([_format_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _format_cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else escape_control_characters(str(value)).replace("|", "\\|")


def format_csv_table(columns: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Returns the table as CSV, numbers in full."""
    text = io.StringIO()
    table = [[format_csv_cell(value) for value in row] for row in (columns, *rows)]
    csv.writer(text).writerows(table)
    return text.getvalue()
