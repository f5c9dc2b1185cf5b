"""metrics.csv: one row a step, kept when a run is resumed."""

import csv
import io
from pathlib import Path

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from ldm.files import write_text


class CsvLog(Logger):
    """Appends rows to `path`; a new metric adds a column.

    A resumed run first drops the rows of steps that it will go through again, so that each step
    stands there once. What belongs to the last step is added to its row.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.columns: list[str] = []
        self.open_row: dict[str, str] = {}
        self.begins = 0  # where the open row begins in the file, in bytes

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> "CsvLog":
        return self

    @rank_zero_only
    def log_hyperparams(self, *args, **kwargs) -> None:
        """Nothing: config.yaml has them."""

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop what was logged after `step`."""
        rows = [row for row in self._rows() if int(row["step"]) <= step]
        last = rows.pop() if rows and int(rows[-1]["step"]) == step else {}
        self._rewrite(rows)
        self.open_row = {name: value for name, value in last.items() if value}
        self.save()

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Values of one step; calls for the same step share a row."""
        row = {name: f"{float(value):.9g}" for name, value in metrics.items() if name != "epoch"}
        if not row:
            return
        if self.open_row.get("step") != str(step):
            self.save()
            self.begins = self.path.stat().st_size if self.path.is_file() else 0
            self.open_row = {"step": str(step)}
        self.open_row |= row

    @rank_zero_only
    def save(self) -> None:
        """Put the open row on the disk, in place of what was there of it."""
        if not self.open_row:
            return
        if not set(self.open_row) <= set(self.columns):
            rows = [row for row in self._rows() if row["step"] != self.open_row["step"]]
            self.columns += [name for name in self.open_row if name not in self.columns]
            self._rewrite(rows)
        with self.path.open("r+", newline="") as file:
            file.seek(self.begins)
            csv.DictWriter(file, self.columns).writerow(self.open_row)
            file.truncate()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()

    def _rows(self) -> list[dict[str, str]]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = [row for row in reader if (row.get("step") or "").isdigit()]
            self.columns = list(reader.fieldnames or [])
        return rows

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path, text.getvalue())
        self.begins = self.path.stat().st_size
