"""Runs that end early, by their own curve or by those beside them."""

from types import SimpleNamespace

import pytest

from ldm.training.callbacks.early_stop import MedianStopping


def write(directory, values):
    directory.mkdir(parents=True)
    rows = [f"{step},{value}" for step, value in values.items()]
    (directory / "metrics.csv").write_text("\n".join(["step,val/loss", *rows]) + "\n")


def at(step, value):
    """What of a trainer is looked at."""
    return SimpleNamespace(global_step=step, callback_metrics={"val/loss": value})


@pytest.fixture
def others(tmp_path):
    write(tmp_path / "a", {0: 1.0, 10: 0.5, 20: 0.1})
    write(tmp_path / "b", {0: 1.0, 10: 0.6, 20: 0.2})
    write(tmp_path / "c", {0: 1.0, 10: 0.7})
    write(tmp_path / "mine", {0: 1.0})
    return tmp_path


def test_behind_the_median_at_the_same_step(others):
    rule = MedianStopping(str(others / "mine"), metric="val/loss", direction="minimize", others=2)
    assert rule.is_behind(at(10, 0.61))
    assert not rule.is_behind(at(10, 0.6)), "equal is not behind"
    assert not rule.is_behind(at(10, 0.59))
    assert rule.is_behind(at(20, 0.16)), "the median of those that came as far"
    assert not rule.is_behind(at(30, 9.0)), "nobody came as far"
    rule = MedianStopping(str(others / "mine"), metric="val/loss", direction="maximize", others=2)
    assert not rule.is_behind(at(10, 0.1)), "1.0 was the best of all"


def test_its_best_so_far_counts(others):
    write(others / "good", {0: 1.0, 10: 0.01})
    rule = MedianStopping(str(others / "good"), metric="val/loss", direction="minimize", others=2)
    assert not rule.is_behind(at(20, 0.9))


def test_too_few_to_compare_with(others):
    rule = MedianStopping(str(others / "mine"), metric="val/loss", direction="minimize", others=4)
    assert not rule.is_behind(at(10, 9.0))
