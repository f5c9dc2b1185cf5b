"""metrics.csv: one row a step, kept when a run is resumed."""

import csv
import io
import os
import warnings
from contextlib import suppress
from pathlib import Path

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from ldm.utils.files import write_text


class CsvLog(Logger):
    """Appends rows to `path`; a new metric adds a column.

    A resumed run first drops the rows of steps that it will go through again, so that each step
    stands there once. What belongs to the last step is added to its row.
    A disk that takes no more is told once; rows then wait in memory, and are written when it does.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.columns: list[str] = []
        # Not on the disk for good: the row that is open, and those before it that found no room.
        self.open_rows: list[dict[str, str]] = []
        self.begins = 0  # where they begin in the file, in bytes
        self.full = False

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
        self.open_rows = [{name: value for name, value in last.items() if value}] if last else []
        self.save()

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Values of one step; calls for the same step share a row."""
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
        """Put the open rows on the disk, in place of what was there of them."""
        try:
            self._write()
            self.full = False
        except OSError as error:
            if not self.full:
                said = f"{self.path} cannot be written ({error.strerror or error})"
                warnings.warn(f"{said}; the training goes on, and its rows wait", stacklevel=2)
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
        """The file with these rows, and columns of these names besides those that it has."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        columns = list(dict.fromkeys([*self.columns, *names]))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path, text.getvalue())
        self.columns = columns
        self.begins = self.path.stat().st_size
