"""One run on 2, 1, 4 and 3 processes within one epoch is the run that one process would make."""

import shutil
from pathlib import Path

import pytest
import recorder
from shell import ROOT, TRAIN, rows, run, tensors
from world import SIZE
from world_size_runs import BATCH, BUCKETS, RUN, SIDES, STEPS, write

MANY = [  # processes, data workers, accumulated micro-steps, the step it is left after, and how
    (2, 2, 2, 5, "SIGTERM"),
    (1, 0, 1, 9, "max_steps"),
    (4, 1, 1, 14, "SIGTERM"),
    (3, 2, 2, STEPS, "max_steps"),
]
SIZES = "buckets=[[16,16],[24,16],[16,24],[32,16]]"
CACHED = {  # the settings of a run from a cache, in place of those from images
    "data=coco": "data=cached",
    "data.train=shards": "data.train=cache",
    "data.val=shards": "data.val=cache",
    f"data.size={SIZE}": "posterior=mean",
}
FEW = [(2, 0, 1, 7, "max_steps"), (4, 1, 3, STEPS, "max_steps")]


def train(
    home: Path, devices: int, workers: int, accumulate: int, *more: str, expect=0, settings=RUN
) -> str:
    options = [f"trainer.devices={devices}", f"data.workers={workers}"]
    options += [f"trainer.accumulate_grad_batches={accumulate}", *more]
    path = f"{ROOT}:{ROOT / 'tests' / 'helpers'}"
    return run(
        TRAIN, *settings, *options, cwd=home, expect=expect, PYTHONPATH=path, OMP_NUM_THREADS="1"
    )


def keys_of_steps(lines: list[dict]) -> dict[int, list[str]]:
    """The keys of each optimizer step, over ranks and micro-steps, in alphabetical order."""
    found: dict[int, list[str]] = {}
    for line in lines:
        found.setdefault(line["step"], []).extend(line["keys"])
    return {step: sorted(keys) for step, keys in sorted(found.items())}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "parts"),
    [((70, 10, 40, 3, 60, 33, 19), MANY), ((150, 85), FEW)],
    ids=["uneven shards", "fewer shards than processes"],
)
def test_a_run_may_change_its_number_of_processes_in_mid_epoch(tmp_path, sizes, parts):
    whole, changing = tmp_path / "whole", tmp_path / "changing"
    count = write(whole / "shards", *sizes)
    shutil.copytree(whole / "shards", changing / "shards")
    assert (STEPS - 1) * BATCH < count < STEPS * BATCH, "the last step crosses the epoch's end"
    train(whole, 1, 0, 1, f"trainer.max_steps={STEPS}", "name=run")
    for devices, workers, accumulate, step, how in parts:
        last = f"trainer.max_steps={STEPS if how == 'SIGTERM' else step}"
        told = [f"+early_stop.leave_at={step}"] if how == "SIGTERM" else []
        code = 75 if how == "SIGTERM" else 0
        train(changing, devices, workers, accumulate, last, *told, "name=run", expect=code)

    expected, lines = recorder.read(whole / "seen"), recorder.read(changing / "seen")
    begun = 0
    for devices, _, accumulate, step, _ in parts:
        own = [line for line in lines if begun < line["step"] <= step]
        ranks = {(line["rank"], line["world"]) for line in own}
        assert ranks == {(rank, devices) for rank in range(devices)}
        assert len(own) == devices * accumulate * (step - begun)
        begun = step
    assert keys_of_steps(lines) == keys_of_steps(expected)
    samples = [pair for line in lines for pair in zip(line["positions"], line["keys"], strict=True)]
    epoch = sorted(key for position, key in samples if position < count)
    assert epoch == [f"{n:04}" for n in range(count)], "every sample once"

    assert_same_training(whole, changing)


def assert_same_training(whole: Path, changing: Path) -> None:
    one, other = (rows(home / "runs" / "run") for home in (whole, changing))
    assert [row["step"] for row in other] == [str(step) for step in range(1, STEPS + 1)]
    losses = [[float(row["train/loss"]) for row in found] for found in (one, other)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    one, other = (tensors(home / "runs" / "run") for home in (whole, changing))
    assert one["ldm"]["images_seen"] == other["ldm"]["images_seen"] == STEPS * BATCH
    for name, tensor in one["state_dict"].items():
        # The mean: where a gradient is near nought, AdamW makes a whole step of rounding.
        assert (other["state_dict"][name] - tensor).abs().double().mean() < 2e-5, name


def bucket_of(key: str) -> int:
    return BUCKETS[SIDES[int(key) % len(SIDES)]]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["images", "cache"])
def test_a_run_with_buckets_may_change_its_number_of_processes_in_mid_epoch(tmp_path, source):
    whole, changing = tmp_path / "whole", tmp_path / "changing"
    count = write(whole / "shards", 70, 10, 40, 3, 20, sides=SIDES)
    settings, buckets = (
        [*RUN, f"data.{SIZES}"],
        "16x16 50.3%, 24x16 25.2%, 16x24 12.6%, 32x16 11.9%",
    )
    if source == "cache":
        settings, buckets = [CACHED.get(word, word) for word in RUN], "143 images"
        words = ("data=shards", "out=cache", SIZES, "autoencoder=identity", "posterior=mean")
        run("-m", "ldm.cache", *words, cwd=whole)
    shutil.copytree(whole, changing)
    told = train(whole, 1, 0, 1, f"trainer.max_steps={STEPS}", "name=run", settings=settings)
    assert buckets in told
    begun = 0
    for devices, workers, accumulate, step, how in MANY:
        last = f"trainer.max_steps={STEPS if how == 'SIGTERM' else step}"
        left = [f"+early_stop.leave_at={step}"] if how == "SIGTERM" else []
        code = 75 if how == "SIGTERM" else 0
        options = [last, *left, "name=run"]
        train(changing, devices, workers, accumulate, *options, expect=code, settings=settings)
        lines = recorder.read(changing / "seen")
        own = [line for line in lines if begun < line["step"] <= step]
        assert len(own) == devices * accumulate * (step - begun)
        begun = step

    steps = keys_of_steps(lines)
    assert steps == keys_of_steps(recorder.read(whole / "seen"))
    assert all(len({bucket_of(key) for key in keys}) == 1 for keys in steps.values())
    samples = [pair for line in lines for pair in zip(line["positions"], line["keys"], strict=True)]
    assert sorted(position for position, _ in samples) == list(range(STEPS * BATCH))
    for bucket in range(4):
        members = {f"{n:04}" for n in range(count) if bucket_of(f"{n:04}") == bucket}
        seen = [key for _, key in sorted(samples) if bucket_of(key) == bucket]
        assert len(seen) > len(members), "more than an epoch of each bucket"
        assert sorted(seen[: len(members)]) == sorted(members), "every sample once"
        assert len(set(seen[len(members) :])) == len(seen) - len(members)
    assert_same_training(whole, changing)
