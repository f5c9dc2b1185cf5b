"""A run with aspect-ratio buckets, from the command line: resumed, on two processes, sampled."""

import json
import shutil

import pytest
import recorder
from PIL import Image
from same_training import assert_same_training
from shell import ROOT, TRAIN, run
from test_world_sizes import keys_of_steps
from world import CAPTIONS, shape
from world_size_runs import BATCH, RUN

from ldm.data.image_decoding import read_image
from ldm.data.shards.reader import write_shard
from ldm.utils.checkpoint_file import find_newest_checkpoint, read_checkpoint

pytestmark = pytest.mark.slow  # each test is processes
STEPS = 6
SHAPES, KINDS = ((24, 16), (16, 24), (16, 16)), (0, 1, 2, 0, 0, 1)
BUCKETS = ["data.buckets=[[24,16],[16,24],[16,16]]", "samples.n=3", "eval=none"]
LAST = f"checkpoints/step={STEPS:08}_end.ckpt"


def write_pictures(folder):
    """60 shapes: three in six are wide, two tall, one is square."""
    folder.mkdir(parents=True)
    for shard in range(3):
        samples = []
        for n in range(20 * shard, 20 * shard + 20):
            size = SHAPES[KINDS[n % 6]]
            file = folder.parent / "one.png"
            read_image(shape(n % 10)).resize((2 * size[0], 2 * size[1])).save(file)
            samples.append(
                (f"{n:04}", {"png": file.read_bytes(), "txt": CAPTIONS[n % 10].encode()})
            )
        write_shard(folder / f"{shard:05}.tar", iter(samples))


def train(home, *more: str, expect: int = 0) -> str:
    path = f"{ROOT}:{ROOT / 'tests' / 'helpers'}"
    return run(
        *(TRAIN, *RUN, *BUCKETS, *more),
        cwd=home,
        expect=expect,
        PYTHONPATH=path,
        OMP_NUM_THREADS="1",
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with shards and a run that nothing stopped."""
    home = tmp_path_factory.mktemp("whole")
    write_pictures(home / "shards")
    said = train(home, f"trainer.max_steps={STEPS}", "name=run")
    assert "buckets: 24x16 50.0%, 16x24 33.3%, 16x16 16.7%; cut away: 0.0% of an image" in said
    return home


def test_a_stopped_run_goes_on_bit_for_bit(whole, tmp_path):
    shutil.copytree(whole / "shards", tmp_path / "shards")
    train(tmp_path, f"trainer.max_steps={STEPS}", "+early_stop.leave_at=2", "name=run", expect=75)
    train(tmp_path, "trainer.max_steps=4", "data.workers=0", "name=run")
    train(tmp_path, f"trainer.max_steps={STEPS}", "name=run")
    assert_same_training(*(home / "runs" / "run" / LAST for home in (whole, tmp_path)))


def test_two_processes_see_the_same_steps(whole, tmp_path):
    shutil.copytree(whole / "shards", tmp_path / "shards")
    two = ["trainer.devices=2", "trainer.accumulate_grad_batches=2", "name=run"]
    train(tmp_path, *two, f"trainer.max_steps={STEPS}")
    steps, expected = (keys_of_steps(recorder.read(home / "seen")) for home in (tmp_path, whole))
    assert steps == expected
    assert all(len(keys) == BATCH for keys in steps.values())
    kinds = [{KINDS[int(key) % 6] for key in keys} for keys in steps.values()]
    assert all(len(kind) == 1 for kind in kinds), "one size a step"


def test_examples_have_the_sizes_of_the_validation_images(whole):
    grid = Image.open(whole / "runs" / "run" / "samples" / f"step={STEPS:08}.png")
    assert grid.size == (3 * 24 + 4, 24), "wide, tall and square"


def test_pictures_of_three_aspects_are_sampled_and_evaluated(whole):
    sample = [str(ROOT / "sample.py"), "ckpt=runs/run", "prompt=a red circle", "n=1", "steps=2"]
    for size, sides in (("8", (8, 8)), ("[16,24]", (24, 16)), ("[24,16]", (16, 24))):
        said = run(*sample, f"size={size}", f"out={size}.png", cwd=whole)
        assert Image.open(whole / f"{size}.png").size == sides
        assert ("shapes repeat" in said) == (size == "8"), "smaller than it was trained on"
    evaluate = ["-m", "ldm.evaluate", "ckpt=runs/run", "features=[clip]", "count=8", "steps=1"]
    run(*evaluate, "size=[16,24]", "real=16", cwd=whole)
    result = json.loads(next((whole / "runs" / "run").glob("metrics*.json")).read_text())
    assert result["settings"]["size"] == [16, 24]
    said = run(*evaluate, "size=[16,23]", cwd=whole, expect=2)
    assert "size=[16,23]: this run generates multiples of 2: size=[16,24]" in said


def test_autoencoders_and_masks_take_several_sizes(whole):
    more = ["trainer.max_steps=2", "trainer.val_check_interval=2", "name=ae"]
    ae = ["stage=autoencoder", "autoencoder=tiny", "autoencoder.path=null", "autoencoder.patch=1"]
    buckets = [word for word in BUCKETS if word != "eval=none"]
    settings = [word for word in RUN if not word.startswith(("autoencoder", "model", "+model"))]
    train_words = [TRAIN, *settings, *buckets, *ae, *more, "autoencoder.channels=8"]
    path = f"{ROOT}:{ROOT / 'tests' / 'helpers'}"
    run(*train_words, cwd=whole, PYTHONPATH=path)
    train(whole, "task=inpaint", "trainer.max_steps=2", "name=inpaint")
    grid = Image.open(whole / "runs" / "inpaint" / "samples" / "step=00000002.png")
    assert grid.size == (3 * 24 + 4, 2 * 24 + 2)


def test_a_network_that_takes_sizes_gets_those_of_each_image(whole):
    train(whole, "+model.size_embedding=8", "trainer.max_steps=2", "name=sized")
    last = find_newest_checkpoint(whole / "runs" / "sized" / "checkpoints")
    assert read_checkpoint(last)["ldm"]["sizes"]
    first = find_newest_checkpoint(whole / "runs" / "run" / "checkpoints")
    assert not read_checkpoint(first)["ldm"]["sizes"]


def test_sizes_that_the_networks_do_not_take_are_refused_in_one_line(whole):
    said = train(whole, "data.buckets=[[24,15]]", "name=refused", expect=2)
    assert "data.buckets has [24,15]: 15 is no multiple of 2, which the networks" in said
    assert not (whole / "runs" / "refused").exists()
