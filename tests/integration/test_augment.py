"""A painted data set: its bytes, what an interruption costs, what is left out and what refused."""

import json
import multiprocessing
import shutil
from pathlib import Path

import pytest
from evaluated_runs import Home
from hydra import compose, initialize_config_dir
from PIL import Image
from several import several
from shell import run, wait_for
from world import CAPTIONS, write_shapes

from ldm.cli.augment import AUGMENT_TEXT_OPTIONS, augment_dataset
from ldm.config.command_line import convert_to_usage_errors
from ldm.config.composition import CONF_DIR
from ldm.data.prepare.synthetic import ScoreFilter
from ldm.data.prepare.writer import OutputShard, plan_shards
from ldm.data.shards.reader import ShardReader
from ldm.utils.errors import UsageError
from ldm.utils.locks import lock_directory

BRIEF = ["device=cpu", "steps=1", "n=10", "samples_per_shard=4", "batch=3"]
TEMPLATE = "a {colour} {label}, dotted, on a {colour2} background"
WORDS = {"colour": ["red", "blue", "teal"], "label": ["star", "heart"]}


@pytest.fixture(scope="module")
def home(tiny_clip, tmp_path_factory) -> Home:
    """A folder with a CLIP and a run on drawn scenes."""
    path = tmp_path_factory.mktemp("home")
    tiny_clip.save(path / "clip")
    home = Home(path)
    home.train("drawn", "trainer.max_steps=1", "eval=none")
    return home


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def paint(home):
    """Paints a set by a function call; `given` are texts of the command line."""

    def call(out: str, *overrides: str, words=WORDS, template: str | None = TEMPLATE, **given):
        with initialize_config_dir(CONF_DIR, version_base="1.3"):
            cfg = compose("augment", overrides=[*BRIEF, *overrides])
        asked = {name: cfg[name] for name in AUGMENT_TEXT_OPTIONS}
        asked |= {"ckpt": f"{home.path}/runs/drawn", "clip": f"{home.path}/clip"}
        words = {} if template is None else words
        with convert_to_usage_errors():
            augment_dataset(cfg, asked | {"out": out, "template": template, **given}, words)

    return call


def contents(folder: str) -> dict[str, bytes]:
    """What must be the same however it came about; an index has times in it."""
    kept = ("*.tar", "*_stats.json", "prepare.json", "report.json", "sheet.png")
    return {path.name: path.read_bytes() for kind in kept for path in Path(folder).glob(kind)}


def records(folder: str) -> list[dict]:
    shards = ShardReader(folder)
    found = []
    for i in range(len(shards)):
        offset, size = shards.index.locations(i)[2]
        data = shards.index.paths[shards.index.shard[i]].read_bytes()
        found.append(json.loads(data[offset : offset + size]))
    return found


def test_a_set_says_what_it_is_and_trains_at_once(home, paint, capsys):
    paint("a")
    said = capsys.readouterr().out
    assert "10 generated, 0 left out by the filter" in said
    assert "by label: heart 5, star 5" in said
    found = records("a")
    assert [one["key"] for one in found] == [f"0000{i // 4}000{i % 4}" for i in range(10)]
    for i, one in enumerate(found):
        assert one["seed"] == i
        assert one["label"] == one["slots"]["label"]
        colours = one["slots"]["colour"], one["slots"]["colour2"]
        text = "a {} {}, dotted, on a {} background".format(colours[0], one["label"], colours[1])
        assert one["prompt"] == one["caption"] == text
        assert 0 <= one["score"] <= 100
    settings = json.loads(Path("a/prepare.json").read_text())
    assert (settings["n"], settings["seed"], settings["template"]) == (10, 0, TEMPLATE)
    assert settings["clip"].startswith(f"{home.path}/clip ")
    assert Image.open("a/sheet.png").width > 6 * 192
    places = [f"data.{part}={Path('a').absolute()}" for part in ("train", "val")]
    data = home.train("on", "trainer.max_steps=1", "eval=none", data=["data=shards", *places]).data
    assert {data.val_set[i, i]["captions"] for i in range(10)} <= {one["prompt"] for one in found}


def test_a_picture_depends_on_its_seed_alone(paint):
    """Ten from seed 0 and six from seed 4, cut into other shards: those of both are the same."""
    paint("a", "batch=1")
    paint("b", "batch=1", "seed=4", "n=6", "samples_per_shard=2")
    a, b = (
        {one["seed"]: (one["prompt"], shards.read(i).image) for i, one in enumerate(records(name))}
        for name, shards in (("a", ShardReader("a")), ("b", ShardReader("b")))
    )
    assert b == {seed: a[seed] for seed in range(4, 10)}


def test_processes_share_it_and_its_bytes_are_the_same(paint, tmp_path):
    paint("one")
    several(2, lambda: paint("two"), tmp_path)
    assert contents("one") == contents("two")
    assert len([*Path("two").glob("*.tar")]) == 3


def test_what_a_kill_interrupts_goes_on(paint):
    many = ["n=24", "steps=4"]
    child = multiprocessing.get_context("fork").Process(target=paint, args=("cut", *many))
    child.start()
    wait_for(lambda: Path("cut/00001_stats.json").exists() or not child.is_alive())
    child.kill()
    child.join()
    Path("cut/00009.tar.0a1b2c3d.tmp").touch()  # as a kill in the middle of a file leaves it
    done = {path: path.stat().st_mtime_ns for path in Path("cut").glob("*_stats.json")}
    assert 2 <= len(done) < 6, "it was to be killed in the middle"
    paint("cut", *many)
    assert {path: path.stat().st_mtime_ns for path in done} == done, "nothing is painted twice"
    paint("whole", *many)
    assert contents("cut") == contents("whole")
    assert not [*Path("cut").glob("*.tmp")]


def test_a_shard_that_is_not_as_it_was_is_painted_anew(paint):
    paint("a")
    before = contents("a")
    data = bytearray(before["00001.tar"])
    data[700] ^= 1
    Path("a/00001.tar").write_bytes(data)
    Path("a/00002.tar").unlink()
    paint("a")
    assert contents("a") == before


@pytest.mark.parametrize(
    ("overrides", "given", "message"),
    [
        (["steps=2"], {}, r"other settings \(steps was 1\): use another out"),
        (["n=11"], {}, "n was 10"),
        (["batch=4"], {}, "batch was 3"),
        (["guidance.scale=3"], {}, "guidance was"),
        ([], {"template": "a {colour} {label}, dotted, on {colour2}"}, "template was"),
        ([], {"template": None}, "captions was None"),
        ([], {"clip": "none"}, "clip was"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(paint, overrides, given, message):
    paint("a")
    with pytest.raises(UsageError, match=message):
        paint("a", *overrides, **given)


def test_a_folder_of_others_is_refused(paint, shapes, tmp_path):
    shutil.copytree(shapes, "a")
    with pytest.raises(UsageError, match=r"out=a holds 00000.tar, and no generated set"):
        paint("a")
    Path("notes").mkdir()
    Path("notes/mine.txt").touch()
    with pytest.raises(UsageError, match=r"out=notes holds mine.txt, and no generated set"):
        paint("notes")
    with pytest.raises(UsageError, match=r"out=notes/mine.txt is a file"):
        paint("notes/mine.txt")

    def taken():
        with lock_directory(Path("b")), open("ready", "w"):
            wait_for(Path("done").exists)

    other = multiprocessing.get_context("fork").Process(target=taken)
    other.start()
    wait_for(Path("ready").exists)
    with pytest.raises(UsageError, match="another process generates b: wait for it"):
        paint("b")
    Path("done").touch()
    other.join()


def test_the_filter_keeps_the_best(paint, capsys):
    paint("all")
    scores = {one["key"]: one["score"] for one in records("all")}
    paint("half", "keep=0.5")
    for shard in range(3):
        own = {key: score for key, score in scores.items() if key.startswith(f"0000{shard}")}
        best = sorted(own, key=own.get, reverse=True)[: len(own) // 2]
        kept = [one["key"] for one in records("half") if one["key"] in own]
        assert sorted(kept) == sorted(best)
    bar = sorted(scores.values())[6]
    paint("above", f"min_score={bar}")
    expected = [key for key, score in scores.items() if score >= bar]
    assert [one["key"] for one in records("above")] == expected
    assert f"10 generated, {10 - len(expected)} left out by the filter" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"none of 10 images \(CLIP scores: least"):
        paint("none", "min_score=100")


def test_a_sift_by_scores():
    assert ScoreFilter()([None, None]) == [True, True]
    assert ScoreFilter(keep=0.5)([1, 3, 2, 3]) == [False, True, False, True]
    assert ScoreFilter(keep=0.25)([5, 5, 5, 5]) == [True, False, False, False]
    assert ScoreFilter(keep=0.01)([1, 2]) == [False, True], "one stays"
    assert ScoreFilter(min_score=2)([1, 2, 3]) == [False, True, True]
    assert ScoreFilter(min_score=3, keep=0.7)([1, 2, 3]) == [False, False, True]


def test_parts_of_a_set():
    found = plan_shards(Path("x"), range(5), samples_per_shard=2)
    assert found[2] == OutputShard(Path("x"), 2, range(4, 5))
    for count, each in ((0, 2), (5, 0), (5, 10_001), (200_001, 2)):
        with pytest.raises(ValueError, match="must be in 1"):
            plan_shards(Path("x"), range(count), samples_per_shard=each)


def test_prompts_are_the_training_captions_where_none_are_given(home, paint):
    paint("a", "n=8", template=None)
    (train,) = (home.path / "data").glob("**/train-*")
    captions = [ShardReader(train).read(i).captions[0] for i in range(8)]
    assert sorted(one["prompt"] for one in records("a")) == sorted(captions)
    paint("b", "n=8", template=None, captions=str(train))
    assert [one["prompt"] for one in records("b")] == [one["prompt"] for one in records("a")]
    assert "label" not in records("a")[0] or records("a")[0]["label"] is None


def test_training_captions_that_are_gone_are_told(home, paint):
    folder = write_shapes(home.path / "shapes", range(8))
    places = [f"data.train={folder}", f"data.val={folder}"]
    home.train("shapes", "trainer.max_steps=1", "eval=none", data=["data=coco", *places])
    ckpt = f"{home.path}/runs/shapes"
    paint("a", template=None, ckpt=ckpt)
    assert {one["prompt"] for one in records("a")} <= {*CAPTIONS}
    shutil.rmtree(folder)
    with pytest.raises(UsageError, match=r"are not here: give template=... or captions=..."):
        paint("b", template=None, ckpt=ckpt)


@pytest.mark.parametrize(
    ("overrides", "given", "message"),
    [
        ([], {"captions": "x.txt"}, "not from both"),
        ([], {"template": None, "captions": "gone.txt"}, "gone.txt"),
        ([], {"template": "a {size}"}, "slot {size} has no words"),
        ([], {"out": None}, "out is needed"),
        ([], {"ckpt": None}, "ckpt is needed"),
        (["n=0"], {}, "n must be in 1"),
        (["format=gif"], {}, "format=gif is none of png, jpg, webp"),
        (["min_score=20"], {"clip": "none"}, "min_score=20 is by CLIP score: give clip="),
    ],
)
def test_mistakes_are_told_before_anything_is_painted(paint, overrides, given, message):
    given = {"out": "a", **given}
    with pytest.raises(UsageError, match=message):
        paint(given.pop("out"), *overrides, **given)
    assert not Path("a").exists()


def test_slots_without_a_template_are_told(home):
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        cfg = compose("augment")
    asked = {name: cfg[name] for name in AUGMENT_TEXT_OPTIONS}
    with pytest.raises(UsageError, match=r"slots.colour is for a template: give template="):
        augment_dataset(cfg, asked, {"colour": ["red"]})


def test_other_formats_and_no_scores(paint):
    paint("a", "format=jpg", clip="none")
    assert ShardReader("a").read(0).image.startswith(b"\xff\xd8\xff")
    assert records("a")[0]["score"] is None
    assert "score" not in json.loads(Path("a/report.json").read_text())


def test_the_command_line(home):
    """Slots hold any characters but commas, and mistakes cost one line."""
    command = ["-m", "ldm.augment", *BRIEF, "n=4", "ckpt=runs/drawn", "out=cli", "clip=none"]
    command += ["template=a {x}, $(touch pwned) = '{label}'", "slots.label=[left of,🌊]"]
    command += ["slots.x=it's {odd},50% ${oops} [x]"]
    said = run(*command, "keep=2", cwd=home.path, expect=2)
    assert "keep=2 must be a number above 0 and up to 1" in said
    assert "Traceback" not in said
    assert run(*command, cwd=home.path).endswith("cli/sheet.png\n4 samples in cli\n")
    found = records(str(home.path / "cli"))
    assert {one["slots"]["x"] for one in found} == {"it's {odd}", "50% ${oops} [x]"}
    assert {one["label"] for one in found} == {"left of", "🌊"}
    assert all("$(touch pwned) = '" in one["prompt"] for one in found)


@pytest.mark.slow
def test_torchrun_leaves_the_same_set(home):
    command = ["-m", "ldm.augment", *BRIEF, "ckpt=runs/drawn", f"clip={home.path}/clip"]
    run(*command, "out=single", cwd=home.path, OMP_NUM_THREADS="1")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    said = run(*torchrun, *command, "out=double", cwd=home.path)
    assert said.count("samples in double") == 1
    assert contents(str(home.path / "single")) == contents(str(home.path / "double"))
