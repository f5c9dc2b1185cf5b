"""Data that is lost for good on one rank of several: what was trained is saved, and told."""

import json
import shutil
import sys
import time
from pathlib import Path

import pytest
from same_training import assert_same
from shell import ROOT, processes, rows, run, wait_for
from world_size_runs import RUN, write

from ldm.data.position_sampler import ShuffledOrder
from ldm.utils.checkpoint_file import (
    find_checkpoint,
    find_newest_checkpoint,
    parse_checkpoint_step,
    read_checkpoint,
)

BATCH, STEPS, BREAK_AT = 12, 12, 2
SIZES = (70, *[1] * 20, 70)  # the shards of one sample are read by one rank alone
NAME = "lost-data"
TWO = [f"trainer.max_steps={STEPS}", "trainer.devices=2", "trainer.accumulate_grad_batches=2"]
TWO += [f"name={NAME}", f"data.window={len(SIZES)}"]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="gloo")


def train(home: Path, *more: str, expect: int = 0) -> str:
    path = f"{ROOT}:{ROOT / 'tests'}"
    train = str(ROOT / "train.py")
    return run(
        *(train, *RUN, *TWO, *more), cwd=home, expect=expect, PYTHONPATH=path, OMP_NUM_THREADS="1"
    )


def place(rank: int, *, micro_step: int) -> tuple[int, int]:
    """A shard of one sample that this rank reads late, and the steps that come before it."""
    order, micro = ShuffledOrder(SIZES, seed=0, window=len(SIZES)), BATCH // (2 * 2)
    ends = [sum(SIZES[: i + 1]) for i in range(len(SIZES))]
    for position in range(STEPS * BATCH):
        step, within = divmod(position, BATCH)
        shard = next(i for i, end in enumerate(ends) if order.at(position)[1] < end)
        at = within // (2 * micro), within // micro % 2
        if step >= BREAK_AT + 6 and SIZES[shard] == 1 and at == (micro_step, rank):
            return shard, step
    raise AssertionError("take other sizes")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with shards, and a run on two processes that met no harm."""
    home = tmp_path_factory.mktemp("whole")
    write(home / "shards", *SIZES)
    train(home)
    return home


def hurt(home: Path, whole: Path, *, shard: int, how: str) -> tuple[str, list[str]]:
    """Shards in a folder, the one of them that will be lost, and what does that."""
    shutil.copytree(whole / "shards", home / "shards")
    lost = f"shards/{shard:05}.tar"
    broken = ["early_stop._target_=recorder.Break", f"+early_stop.file={lost}"]
    broken += [f"+early_stop.after={BREAK_AT}", f"+early_stop.how={how}", "~early_stop.folder"]
    return lost, broken


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "micro_step", "workers", "every", "how"),
    [(1, 1, 0, 99, "cut"), (0, 0, 0, 99, "removed"), (1, 0, 2, 1, "removed")],
    ids=["second rank in mid-step", "first rank", "while the first rank saves"],
)
def test_what_was_trained_is_saved_by_the_rank_that_lost_its_data(
    tmp_path, whole, rank, micro_step, workers, every, how
):
    shard, steps = place(rank, micro_step=micro_step)
    lost, broken = hurt(tmp_path, whole, shard=shard, how=how)
    options = [f"data.workers={workers}", f"checkpoint.every={every}"]
    said = train(tmp_path, *options, *broken, expect=1)
    run_dir = tmp_path / "runs" / NAME
    assert time.time() - (run_dir / "error.txt").stat().st_mtime < 30
    result = json.loads((run_dir / "result.json").read_text())
    assert result["status"] == "failed"
    assert result["error"].startswith(f"ShardError: {lost} c")
    assert f"[rank {rank} on " in result["error"]
    assert f"ShardError: {lost} c" in said
    if rank:
        assert f"the first error was {result['error']}\n" in said, "the first rank says so"
    wait_for(lambda: not processes(f"name={NAME}"), seconds=20)
    newest = find_newest_checkpoint(run_dir / "checkpoints")
    assert (result["steps"], parse_checkpoint_step(newest)) == (steps, steps)
    assert result["checkpoint"] == f"checkpoints/{newest.name}"
    assert read_checkpoint(newest)["ldm"]["images_seen"] == steps * BATCH
    assert not list((run_dir / "checkpoints").glob("*.tmp"))
    assert [int(row["step"]) for row in rows(run_dir)] == list(range(1, steps + 1))

    shutil.copy2(whole / lost, tmp_path / lost)
    assert "resumes" in train(tmp_path, *options)
    ends = [find_checkpoint(str(home / "runs" / NAME)) for home in (whole, tmp_path)]
    one, other = map(read_checkpoint, ends)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert_same(one[part], other[part], part)
    assert other["ldm"]["images_seen"] == STEPS * BATCH


@LINUX
@pytest.mark.slow
def test_a_rank_with_a_part_of_the_weights_says_what_is_not_saved(tmp_path, whole):
    shard, steps = place(1, micro_step=1)
    _, broken = hurt(tmp_path, whole, shard=shard, how="cut")
    said = train(tmp_path, *broken, "strategy=fsdp", "checkpoint.every=3", expect=1)
    saved = steps // 3 * 3
    assert saved < steps
    assert f"what was trained after step {saved} is not saved: no rank has all weights" in said
    run_dir = tmp_path / "runs" / NAME
    assert json.loads((run_dir / "result.json").read_text())["error"].startswith("ShardError: ")
    assert parse_checkpoint_step(find_newest_checkpoint(run_dir / "checkpoints")) == saved
