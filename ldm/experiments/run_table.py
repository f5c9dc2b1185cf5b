"""Runs as plain rows, for Python code and for pandas."""

from os import PathLike
from pathlib import Path

from ldm.experiments.ranking import (
    RunRecord,
    find_run_differences,
    find_runs,
    read_run_record,
    select_ranking_metrics,
    shorten_run_names,
)
from ldm.utils.errors import UsageError
from ldm.utils.files import resolve_path


def read_runs(*places: str | PathLike[str]) -> list[dict]:
    """Returns a row for each run in these folders, runs or sweeps, as pandas.DataFrame takes them.

    A row has `run`, what differs between the runs (an option's name, or a setting's value),
    `status`, `metric`, `value`, `steps`, `images_seen`, `seconds`, the last value of each metric of
    a ranking, `directory` and `checkpoint`; None where a run has none.
    """
    if not places:
        raise UsageError("ldm.read_runs: give folders with runs, such as runs/my-sweep")
    folders = [resolve_path(Path(place)) for place in places]
    records = [read_run_record(path) for path in find_runs(folders)]
    differences = find_run_differences(records)
    metrics = select_ranking_metrics(records)
    return [
        {
            "run": name,
            **{key: _find_setting(record, key) for key in differences},
            "status": record.state,
            **{key: record.result.get(key) for key in ("metric", "value")},
            "steps": record.result.get("steps", record.step),
            **{key: record.result.get(key) for key in ("images_seen", "seconds")},
            **{metric: record.last_value(metric) for metric in metrics},
            "directory": str(record.directory),
            "checkpoint": _find_checkpoint(record),
        }
        for record, name in zip(records, shorten_run_names(records), strict=True)
    ]


def _find_setting(record: RunRecord, key: str) -> object:
    """The option of a group, or the value of a setting."""
    if key in record.choices:
        return record.choices[key]
    node: object = record.config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _find_checkpoint(record: RunRecord) -> str | None:
    newest = record.result.get("checkpoint")
    return None if newest is None else str(record.directory / newest)
