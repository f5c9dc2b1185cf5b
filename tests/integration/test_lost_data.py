"""Data that is lost in mid-run on one rank of several: all ranks end, and few steps repeat."""

import json
import shutil
import sys
import time
from pathlib import Path

import pytest
from same_training import assert_same
from shell import ROOT, processes, run, wait_for
from world_size_runs import BATCH, RUN, write

from ldm.data.position_sampler import ShuffledOrder
from ldm.utils.checkpoint_file import (
    find_checkpoint,
    find_newest_checkpoint,
    parse_checkpoint_step,
    read_checkpoint,
)

STEPS, BREAK_AT, EVERY = 12, 2, 3
SIZES = (70, *[1] * 20, 70)  # the shards of one sample are read by one rank alone
NAME = "lost-data"
TWO = [f"trainer.max_steps={STEPS}", "trainer.devices=2", "trainer.accumulate_grad_batches=2"]
TWO += [f"name={NAME}", f"data.window={len(SIZES)}", f"checkpoint.every={EVERY}"]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="gloo")


def train(home: Path, *more: str, expect: int = 0) -> str:
    path = f"{ROOT}:{ROOT / 'tests' / 'helpers'}"
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
    ("rank", "micro_step", "workers", "how", "strategy"),
    [(1, 1, 0, "cut", "ddp"), (0, 0, 2, "removed", "ddp"), (1, 1, 0, "cut", "fsdp")],
    ids=["second rank in mid-step", "first rank", "with shards of the weights"],
)
def test_a_rank_without_data_ends_all_ranks_and_the_run_resumes_from_its_last_checkpoint(
    tmp_path, whole, rank, micro_step, workers, how, strategy
):
    shard, steps = place(rank, micro_step=micro_step)
    lost, broken = hurt(tmp_path, whole, shard=shard, how=how)
    options = [f"data.workers={workers}", f"strategy={strategy}"]
    output = train(tmp_path, *options, *broken, expect=1)
    run_dir = tmp_path / "runs" / NAME
    assert time.time() - (run_dir / "error.txt").stat().st_mtime < 30
    result = json.loads((run_dir / "result.json").read_text())
    assert result["status"] == "failed"
    assert result["error"].startswith(f"ShardError: {lost} c")
    assert f"[rank {rank} on " in result["error"]
    assert f"ShardError: {lost} c" in output
    if rank:
        assert f"the first error was {result['error']}\n" in output, "the first rank says so"
    wait_for(lambda: not processes(f"name={NAME}"), seconds=20)
    newest = find_newest_checkpoint(run_dir / "checkpoints")
    assert result["steps"] == steps
    assert parse_checkpoint_step(newest) == steps // EVERY * EVERY
    assert result["checkpoint"] == f"checkpoints/{newest.name}"
    assert not list((run_dir / "checkpoints").glob("*.tmp"))
    if strategy == "fsdp":
        return

    shutil.copy2(whole / lost, tmp_path / lost)
    assert "resumes" in train(tmp_path, *options)
    ends = [find_checkpoint(str(home / "runs" / NAME)) for home in (whole, tmp_path)]
    one, other = map(read_checkpoint, ends)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert_same(one[part], other[part], part)
    assert other["ldm"]["images_seen"] == STEPS * BATCH
