"""Reads W&B's own files (`<run dir>/wandb/*/run-<id>.wandb`), those of killed runs as well."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import MetricRecord, Record

BLOCK = 32768


@dataclass
class WandbFile:
    """One start of a run."""

    id: str = ""
    entity: str = ""
    project: str = ""
    group: str = ""
    job_type: str = ""
    name: str = ""
    notes: str = ""
    tags: list[str] = field(default_factory=list)
    alerts: list[tuple[str, str, str]] = field(default_factory=list)  # level, title, text
    artifacts: dict[str, list[str]] = field(default_factory=dict)  # name -> what it refers to
    config: dict = field(default_factory=dict)
    history: list[dict] = field(default_factory=list)
    axes: dict[str, str] = field(default_factory=dict)  # metric or its glob -> its x axis
    exit_code: int | None = None  # None: the run was killed

    def series(self, key: str, axis: str = "trainer/global_step") -> dict[float, float]:
        """What was logged as `key`, by the value of `axis` in the same row."""
        return {row[axis]: row[key] for row in self.history if key in row}


def of_run(run_dir: Path) -> list[WandbFile]:
    """All starts of a run directory, the oldest first."""
    paths = (run_dir / "wandb").glob("*run-*/run-*.wandb")

    def started(path: Path) -> tuple[str, int]:  # to the second; then, which was left first
        return path.parent.name.partition("run-")[2], path.stat().st_mtime_ns

    by_start = sorted(paths, key=started)
    return [read(path) for path in by_start if not path.parent.is_symlink()]  # latest-run


def read(path: Path) -> WandbFile:
    """What the file holds, up to where it is torn."""
    found = WandbFile()
    for record in records(path.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            found.id, found.project, found.group = run.run_id, run.project, run.run_group
            found.name, found.tags = run.display_name, list(run.tags)
            found.entity, found.job_type, found.notes = run.entity, run.job_type, run.notes
            update(found.config, run.config)
        elif kind == "config":
            update(found.config, record.config)
        elif kind == "history":
            items = record.history.item
            row = {item.key or "/".join(item.nested_key): item.value_json for item in items}
            found.history.append({key: json.loads(value) for key, value in row.items()})
        elif kind == "metric":
            metric: MetricRecord = record.metric
            found.axes[metric.glob_name or metric.name] = metric.step_metric
        elif kind == "alert":
            alert = record.alert
            found.alerts.append((alert.level, alert.title, alert.text))
        elif kind == "artifact":
            parts = record.artifact.manifest.contents
            found.artifacts[record.artifact.name] = [part.ref for part in parts]
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def update(config: dict, record) -> None:
    """Put the changes of a config record into `config`."""
    for item in record.update:
        *above, last = list(item.nested_key) or [item.key]
        into = config
        for key in above:
            into = into.setdefault(key, {})
        into[last] = json.loads(item.value_json)


def records(data: bytes) -> Iterator[Record]:
    """The records of a LevelDB log behind a header of 7 bytes; a torn one at the end is dropped."""
    if data[:4] != b":W&B":
        return
    at, whole = 7, b""
    while at + 7 <= len(data):
        left = BLOCK - at % BLOCK
        if left < 7:  # too little for a header: padding
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part = data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind == 0 or len(part) < length:
            return
        whole = part if kind in (1, 2) else whole + part  # 1 full, 2 first, 3 middle, 4 last
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(whole)
            yield record
