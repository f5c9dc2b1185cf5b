"""metrics.csv: one row for each optimizer step, also when a run is resumed."""

import csv
import io
import os
import warnings
from contextlib import suppress
from pathlib import Path

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from ldm.training.loggers.base import RunLogger
from ldm.utils.files import write_text


class CsvLog(Logger, RunLogger):
    """Appends rows to `path`; a new metric adds a column.

    A resumed run first drops the rows of steps that it repeats, so that each step has one row.
    A full disk gives one warning; the rows then wait in memory until there is space.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.columns: list[str] = []
        # The row of the current step, and rows before it that a full disk did not take.
        self.open_rows: list[dict[str, str]] = []
        self.begins = 0  # their offset in the file, in bytes
        self.full = False

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args, **kwargs) -> None:
        """Does nothing: config.yaml holds them."""

    @rank_zero_only
    def rewind(self, step: int) -> None:
        rows = [row for row in self._rows() if int(row["step"]) <= step]
        last = rows.pop() if rows and int(rows[-1]["step"]) == step else {}
        self._rewrite(rows)
        last = {name: value for name, value in last.items() if value}
        self.open_rows = [last] if last else []
        self.save()

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Adds values to the row of a step."""
        row = {name: f"{float(value):.9g}" for name, value in metrics.items() if name != "epoch"}
        if not row:
            return
        if not self.open_rows or self.open_rows[-1]["step"] != str(step):
            self.save()
            if not self.full:
                self.open_rows = []
                self.begins = self.path.stat().st_size if self.path.is_file() else 0
            self.open_rows.append({"step": str(step)})
        self.open_rows[-1] |= row

    @rank_zero_only
    def save(self) -> None:
        """Writes the open rows over their older version on the disk."""
        try:
            self._write()
            self.full = False
        except OSError as error:
            if not self.full:
                message = f"{self.path} cannot be written ({error.strerror or error})"
                warnings.warn(f"{message}; the training goes on, and its rows wait", stacklevel=2)
            self.full = True

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()
        if self.full:
            steps = ", ".join(row["step"] for row in self.open_rows)
            warnings.warn(f"{self.path} lacks step {steps}", stacklevel=2)

    def _write(self) -> None:
        if not self.open_rows:
            return
        names = dict.fromkeys(name for row in self.open_rows for name in row)
        if not names.keys() <= set(self.columns):
            waiting = {row["step"] for row in self.open_rows}
            self._rewrite([r for r in self._rows() if r["step"] not in waiting], *names)
        try:
            with self.path.open("r+", newline="") as file:
                file.seek(self.begins)
                csv.DictWriter(file, self.columns).writerows(self.open_rows)
                file.truncate()
        except OSError:
            with suppress(OSError):
                os.truncate(self.path, self.begins)  # no half a row
            raise

    def _rows(self) -> list[dict[str, str]]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = [row for row in reader if (row.get("step") or "").isdigit()]
            self.columns = list(reader.fieldnames or [])
        return rows

    def _rewrite(self, rows: list[dict[str, str]], *names: str) -> None:
        """Replaces the file by one with these rows, and with columns `names` added."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        columns = list(dict.fromkeys([*self.columns, *names]))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path, text.getvalue())
        self.columns = columns
        self.begins = self.path.stat().st_size
