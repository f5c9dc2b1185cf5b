"""metrics.csv as a reader sees it."""

import csv
import resource
from pathlib import Path

import pytest

from ldm.training.loggers.csv import CsvLog


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def log(tmp_path) -> CsvLog:
    return CsvLog(tmp_path / "run" / "metrics.csv")


def test_a_step_is_a_row_and_a_new_metric_a_column(log):
    log.log_metrics({"loss": 0.5, "epoch": 0}, step=1)
    log.log_metrics({"loss": 0.25}, step=2)
    log.log_metrics({"val/loss": 1 / 3}, step=2)  # the same step: the same row
    log.log_metrics({"loss": 1e-30}, step=3)
    log.finalize("success")
    assert rows(log.path) == [
        {"step": "1", "loss": "0.5", "val/loss": ""},
        {"step": "2", "loss": "0.25", "val/loss": "0.333333333"},
        {"step": "3", "loss": "1e-30", "val/loss": ""},
    ]


def test_a_row_is_on_the_disk_when_saved_or_when_the_next_begins(log):
    log.log_metrics({"loss": 1}, step=1)
    assert not log.path.exists()
    log.log_metrics({"loss": 2}, step=2)
    assert [row["step"] for row in rows(log.path)] == ["1"]
    log.save()
    log.save()
    assert [row["step"] for row in rows(log.path)] == ["1", "2"]


def test_later_values_of_a_saved_step_join_its_row(log):
    log.log_metrics({"loss": 1}, step=1)
    log.log_metrics({"loss": 2}, step=2)
    log.save()
    log.log_metrics({"loss": 3}, step=2)
    log.log_metrics({"fid": 4}, step=2)
    log.log_metrics({"loss": 5}, step=3)
    log.save()
    expected = [
        {"step": "1", "loss": "1", "fid": ""},
        {"step": "2", "loss": "3", "fid": "4"},
        {"step": "3", "loss": "5", "fid": ""},
    ]
    assert rows(log.path) == expected
    again = CsvLog(log.path)  # after a kill between a save and its validation
    again.rewind(2)
    assert rows(log.path) == expected[:2]
    again.log_metrics({"fid": 6}, step=2)
    again.log_metrics({"loss": 7}, step=3)
    again.save()
    assert rows(log.path) == [
        expected[0],
        {"step": "2", "loss": "3", "fid": "6"},
        {"step": "3", "loss": "7", "fid": ""},
    ]


def test_a_log_of_only_the_epoch_writes_no_row(log):
    log.log_metrics({"epoch": 3}, step=1)
    log.save()
    assert not log.path.exists()


def test_a_reopened_file_goes_on(log):
    log.log_metrics({"loss": 1, "speed": 7}, step=1)
    log.save()
    again = CsvLog(log.path)
    again.log_metrics({"speed": 8, "fid": 9}, step=2)
    again.save()
    assert rows(log.path) == [
        {"step": "1", "loss": "1", "speed": "7", "fid": ""},
        {"step": "2", "loss": "", "speed": "8", "fid": "9"},
    ]


def test_rewind_drops_rows_of_steps_that_are_repeated(log):
    for step in (2, 10, 4):
        log.log_metrics({"loss": step}, step=step)
    log.save()
    again = CsvLog(log.path)
    again.rewind(4)
    assert [row["step"] for row in rows(log.path)] == ["2", "4"]
    again.log_metrics({"loss": 1}, step=5)
    again.save()
    assert [row["loss"] for row in rows(log.path)] == ["2", "4", "1"]


def test_rewind_before_the_first_row(log):
    log.rewind(0)
    log.log_metrics({"loss": 1}, step=1)
    log.save()
    assert rows(log.path) == [{"step": "1", "loss": "1"}]


def test_rewind_mends_a_line_that_was_cut_short(log):
    for step in (1, 2):
        log.log_metrics({"loss": step / 8}, step=step)
    log.save()
    text = log.path.read_text()
    log.path.write_text(text[: text.rindex("2,") + 3])  # "2,0" and no end of line
    again = CsvLog(log.path)
    again.rewind(1)
    again.log_metrics({"loss": 0.5}, step=2)
    again.save()
    assert rows(log.path) == [{"step": "1", "loss": "0.125"}, {"step": "2", "loss": "0.5"}]


def test_nan_is_written(log):
    log.log_metrics({"loss": float("nan"), "fid": float("inf")}, step=1)
    log.save()
    assert rows(log.path) == [{"step": "1", "loss": "nan", "fid": "inf"}]


@pytest.fixture
def limit():
    """Sets the size in bytes above which the kernel lets no file of this process grow."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def set_limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    yield set_limit
    set_limit(resource.RLIM_INFINITY)


@pytest.mark.parametrize("room", [0, 14, 20, 30], ids="{} bytes".format)
def test_on_a_full_disk_it_warns_once_and_rows_wait(log, limit, recwarn, room):
    """Of the header, of a row, of a row with a new column: whatever does not fit any more."""
    expected = []
    limit(room)  # the header takes 11 bytes, a row 5, and 7 once there is a third column
    for step in range(1, 6):
        later = str(step) if step > 3 else ""
        log.log_metrics({"loss": step} | ({"val/loss": step} if later else {}), step=step)
        log.save()
        expected.append({"step": str(step), "loss": str(step), "val/loss": later})
    log.finalize("success")
    told = [str(warning.message) for warning in recwarn]
    assert len(told) == 2
    assert told[0].startswith(f"{log.path} cannot be written (File too large); the training goes")
    left = log.path.read_text() if log.path.exists() else ""
    assert left == "" or left.endswith("\n"), "half a row"
    found = [row["step"] for row in rows(log.path)] if left else []
    assert told[1] == f"{log.path} lacks step {', '.join('12345'[len(found) :])}"
    assert found == list("12345")[: len(found)]
    limit(resource.RLIM_INFINITY)
    log.log_metrics({"loss": 6}, step=6)
    log.save()
    assert rows(log.path) == [*expected, {"step": "6", "loss": "6", "val/loss": ""}]
