"""Names of runs, ranks of processes, and the notes in a run directory."""

import os
import re

import pytest

from ldm.experiments.run_dir import (
    get_launcher_layout,
    get_launcher_rank,
    get_train_log_path,
    infer_metric_direction,
    list_config_changes,
    make_run_stamp,
    read_last_value,
    read_metrics,
    read_result,
    select_on_first_rank,
    write_result,
)

LAUNCHERS = (
    "LDM_RUN_STAMP",
    "TORCHELASTIC_RUN_ID",
    "SLURM_JOB_ID",
    "SLURM_PROCID",
    "RANK",
    "LOCAL_RANK",
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.setenv(name, "")  # so that what the test leaves is taken back
        monkeypatch.delenv(name)


def test_a_stamp_is_a_time_and_stays(monkeypatch):
    stamp = make_run_stamp()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", stamp)
    assert os.environ["LDM_RUN_STAMP"] == stamp  # for the processes that this one starts
    monkeypatch.setattr("time.strftime", lambda *_: "later")
    assert make_run_stamp() == stamp


def test_a_stamp_is_taken_from_the_process_that_started_this_one(monkeypatch):
    monkeypatch.setenv("LDM_RUN_STAMP", "2026-01-01_00-00-00")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abc")
    assert make_run_stamp() == "2026-01-01_00-00-00"


@pytest.mark.parametrize(
    ("launcher", "expected"),
    [
        ({"TORCHELASTIC_RUN_ID": "abc"}, "abc"),
        ({"SLURM_JOB_ID": "17"}, "slurm-17"),
        ({"TORCHELASTIC_RUN_ID": "abc", "SLURM_JOB_ID": "17"}, "abc"),
        ({"TORCHELASTIC_RUN_ID": "none", "SLURM_JOB_ID": "17"}, "slurm-17"),
        ({"TORCHELASTIC_RUN_ID": "none"}, "now"),
    ],
)
def test_a_launcher_gives_all_its_processes_one_stamp(monkeypatch, launcher, expected):
    monkeypatch.setattr("time.strftime", lambda *_: "now")
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    assert make_run_stamp() == expected


@pytest.mark.parametrize("more", [{"WORLD_SIZE": "2"}, {"TORCHELASTIC_MAX_RESTARTS": "3"}])
def test_torchrun_without_an_id_gives_ranks_and_restarts_no_common_name(monkeypatch, more):
    """By the clock each would find a name of its own, and begin a run of its own."""
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "1", **more}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="give name=my-run, or torchrun --rdzv-id=my-run"):
        make_run_stamp()


@pytest.mark.parametrize(
    ("launcher", "rank"),
    [
        ({}, 0),
        ({"LOCAL_RANK": "1"}, 1),
        ({"SLURM_PROCID": "3", "LOCAL_RANK": "1"}, 3),
        ({"RANK": "5", "SLURM_PROCID": "0", "LOCAL_RANK": "1"}, 5),
        ({"RANK": "0", "SLURM_PROCID": "3"}, 0),
    ],
)
def test_the_rank_is_the_one_among_all_processes(monkeypatch, launcher, rank):
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    assert get_launcher_rank() == rank
    assert select_on_first_rank(".hydra") == (None if rank else ".hydra")
    assert get_train_log_path("runs/x") == (os.devnull if rank else "runs/x/train.log")


def test_a_result_is_read_back_and_replaced(tmp_path):
    assert read_result(tmp_path) == {}
    write_result(tmp_path, {"status": "failed", "value": None})
    write_result(tmp_path, {"status": "finished", "value": 0.1 + 0.2, "steps": 3})
    assert read_result(tmp_path) == {"status": "finished", "value": 0.1 + 0.2, "steps": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_changes_name_what_a_run_must_not_change():
    old = {"seed": 0, "trainer": {"max_steps": 1}, "data": {"workers": 0, "size": 8}, "gone": 1}
    new = {"seed": 0, "trainer": {"max_steps": 9}, "data": {"workers": 2, "size": 16}, "new": None}
    assert list_config_changes(old, new) == ["data.size was 8, is 16", "gone was 1, is None"]
    assert list_config_changes(old, old) == []


def test_a_setting_that_came_later_may_have_its_default():
    old = {"guidance": {"scale": 2}, "steps": 3}
    new = {"guidance": {"scale": 2, "interval": [0, 1]}, "steps": 3, "kept": {"lengths": []}}
    assert list_config_changes(old, new, new) == []
    assert len(list_config_changes(old, new)) == 2
    other = {"guidance": {"scale": 2, "interval": [0.2, 1]}, "steps": 3, "kept": {"lengths": [1]}}
    assert list_config_changes(old, other, new) == [
        "guidance.interval was None, is [0.2, 1]",
        "kept was None, is {'lengths': [1]}",
    ]
    assert list_config_changes(old, {**old, "steps": 4}, {**new, "steps": 4}) == [
        "steps was 3, is 4"
    ]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"LOCAL_RANK": "1"}, None),  # Lightning has started it, and knows the numbers
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, None),  # a batch script
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}, (4, 2)),
        ({"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "6"}, (2, 3)),
    ],
)
def test_who_has_started_the_processes(monkeypatch, environment, expected):
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert get_launcher_layout() == expected


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("val/loss", "minimize"),
        ("val/loss_t3", "minimize"),
        ("val/fid", "minimize"),
        ("val/fd_dinov2", "minimize"),
        ("val/kid", "minimize"),
        ("train/loss", "minimize"),
        ("perf/data_wait", "minimize"),
        ("perf/memory_gib", "minimize"),
        ("perf/step_ms", "minimize"),
        ("val/clip_score", "maximize"),
        ("val/scene_accuracy", "maximize"),
        ("val/psnr", "maximize"),
        ("perf/images_per_s", "maximize"),
    ],
)
def test_which_way_is_better(metric, expected):
    assert infer_metric_direction(metric) == expected


def test_metrics_are_read_from_the_end_and_through_tears(tmp_path):
    lines = [f"{i},{i / 8}," for i in range(5000)]
    torn = "5000,0."
    (tmp_path / "metrics.csv").write_text("\n".join(["step,val/loss,b", *lines, torn]))
    assert len(read_metrics(tmp_path)) == 5000
    last = read_metrics(tmp_path, tail=100)
    assert 2 < len(last) < 12
    assert last[-1] == {"step": 4999.0, "val/loss": 4999 / 8}
    assert read_last_value(tmp_path, "val/loss") == 4999 / 8
    assert read_last_value(tmp_path, "b") is None
    assert read_metrics(tmp_path / "none") == []
