"""Scores in the json of samples, and runs that train on the samples that meet a condition."""

import io
import json
import re
import signal
import tarfile
import time
from pathlib import Path

import balls
import pytest
from hydra import compose, initialize_config_dir
from material import encoded
from PIL import Image
from shell import ROOT, run, start

from ldm.cli.prepare_scores import prepare_scores
from ldm.config.composition import CONF_DIR
from ldm.config.filter_quotes import split_conditions
from ldm.config.training_images import open_local_images
from ldm.data.shards.reader import ShardReader, write_shard
from ldm.utils.errors import UsageError

TRAIN = str(ROOT / "train.py")
SCORES = ("-m", "ldm.prepare", "scores", "threshold=0.98")
SKIPPING = ("data.on_error=skip", "data.max_skipped=1")
TINY = (
    *("data=shards", "data.size=16", "data.batch_size=4", "data.workers=0", "model=nano"),
    *("model.channels=16", "model.groups=8", "autoencoder=identity", "text_encoder=none"),
    *("trainer=cpu", "trainer.max_steps=2", "trainer.val_check_interval=2", "logger=csv"),
    *("samples.n=1", "samples.steps=1", "eval=none"),
)


def write_pictures(folder: Path) -> Path:
    """Two shards: balls, of which two occur again a little smaller; one is no picture."""
    folder.mkdir()
    for shard in range(2):
        samples = []
        for n in range(shard * 6, shard * 6 + 6):
            data = balls.picture({10: 2, 11: 3}.get(n, n), size=256)
            if n in (10, 11):
                small = Image.open(io.BytesIO(data)).resize((240, 240), Image.Resampling.BICUBIC)
                data = encoded(small)
            members = {"png": data if n != 4 else b"broken", "txt": b"a ball", "cls": b"%d" % n}
            if n != 5:
                record = {"caption": "a ball", "width": 7, "n": n}
                members["json"] = json.dumps(record).encode()
            samples.append((f"{n:03}", members))
        write_shard(folder / f"{shard:05}.tar", samples)
    return folder


def read_members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def read_records(folder: Path) -> dict[str, dict]:
    members = {}
    for path in sorted(folder.glob("*.tar")):
        members |= read_members(path)
    return {name[:3]: json.loads(data) for name, data in members.items() if name.endswith("json")}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with shards, and their copies with scores."""
    place = tmp_path_factory.mktemp("filtered")
    write_pictures(place / "plain")
    said = run(*SCORES, "shards=plain", "out=scored", "against=plain", "batch=5", cwd=place)
    assert "2 of 11 pictures are near-duplicates" in said
    assert "11 of 11 pictures have a near-duplicate in against=.." in said
    assert "12 samples in scored" in said
    return place


def test_scores_are_in_the_json_and_nothing_else_changes(home):
    before, after = (ShardReader(home / name).index for name in ("plain", "scored"))
    assert after.key_bytes.tobytes() == before.key_bytes.tobytes()
    for path in sorted((home / "plain").glob("*.tar")):
        old, new = read_members(path), read_members(home / "scored" / path.name)
        assert [name for name in new if name in old] == list(old)
        assert [name for name in new if name not in old] == ["005.json"] * (path.stem == "00000")
        assert all(new[name] == old[name] for name in old if not name.endswith("json"))
    records = read_records(home / "scored")
    assert records["004"] == {"caption": "a ball", "width": 7, "n": 4}, "no picture, no scores"
    assert records["002"]["caption"] == "a ball"
    assert [records["002"][key] for key in ("width", "height", "aspect")] == [256, 256, 1.0]
    assert -1 <= records["005"]["clip"] <= 1
    groups = {
        key: (row["duplicate_group"], row["duplicate_rank"])
        for key, row in records.items()
        if key != "004"
    }
    assert groups["010"] == (2, 1), "the smaller copy comes second"
    assert groups["002"] == (2, 0)
    assert groups["011"] == (3, 1)
    assert records["001"]["duplicate_of_training"] is True
    assert records["001"]["training_key"] == "001"
    report = json.loads((home / "scored" / "report.json").read_text())
    assert report["unreadable"] == ["004"]
    assert (report["duplicates"], report["duplicates_of_training"]) == (2, 11)
    assert {path.name for path in (home / "scored").glob("*.png")} == {
        *("duplicates.png", "training_duplicates.png")
    }
    assert not list((home / "scored").glob("pieces*"))


def score(*words: str, **paths: str) -> str:
    """What `ldm prepare scores` prints, in this process."""
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        cfg = compose("prepare", ["source=scores", *words])
    return prepare_scores(cfg, {"clip": "packaged:clip"} | paths)


def test_a_killed_scoring_goes_on_and_gives_the_same_scores(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = {"shards": f"{home}/plain", "against": f"{home}/plain", "out": "again"}
    words = [f"{name}={path}" for name, path in paths.items()]
    process = start(*SCORES, *words, "batch=2", cwd=tmp_path)
    deadline = time.monotonic() + 100
    while not list((tmp_path / "again").glob("pieces/*.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "again" / "report.json").exists()
    said = score("batch=2", "threshold=0.98", **paths)
    assert read_records(tmp_path / "again") == read_records(home / "scored")
    monkeypatch.setattr("ldm.cli.prepare_scores.tabulate_pictures", None)
    assert score("batch=2", "threshold=0.98", **paths) == said, "all is there"
    with pytest.raises(ValueError, match=r"started with other settings \(threshold was 0.98"):
        score("threshold=0.5", **paths)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["scores", "out=o"], "shards is needed"),
        (["scores", "shards=https://host/a.tar", "out=o"], "download them first"),
        (["scores", "shards=plain", "out=o", "size=64"], "size is not for scores, which have"),
        (["folder", "images=plain", "out=o", "against=plain"], "against is for scores alone"),
        (["scores", "shards=plain", "out=o", "threshold=2"], "threshold=2 must be a number"),
    ],
)
def test_mistakes_are_refused_in_a_line(home, words, said):
    told = run("-m", "ldm.prepare", *words, cwd=home, expect=2)
    assert said in told
    assert "Traceback" not in told
    assert not (home / "o").exists()


@pytest.mark.parametrize(
    ("paths", "words", "said"),
    [
        ({"out": "plain"}, [], "came from elsewhere: use another out"),
        ({"shards": "*/*.tar"}, [], "have one name"),
        ({"against": "plain"}, ["features=none"], "against=... compares features"),
        ({}, ["features=clip"], "features=clip needs a threshold"),
        ({}, ["features=[efficientnet,clip]"], "one network finds near-duplicates"),
    ],
)
def test_scores_that_cannot_be_are_refused(home, monkeypatch, paths, words, said):
    monkeypatch.chdir(home)
    with pytest.raises((UsageError, FileExistsError), match=re.escape(said)):
        score(*words, **{"shards": "plain", "out": "o", "clip": "none"} | paths)
    assert not (home / "o").exists()


def test_a_run_trains_and_is_measured_on_what_the_condition_keeps(home):
    words = (TRAIN, "name=a", *TINY, "data.train=scored", "data.val=scored")
    where = "data.where=width>=250 and duplicate_rank == 0 and n in [0, 1, 2, 3, 6]"
    said = run(*words, where, *SKIPPING, cwd=home)
    assert "keeps 5 of 12 samples; left out: 3 by width>=250, 4 by n in [0, 1, 2, 3, 6]" in said
    assert "on 5 images (12 for validation)" in said
    said = run(*words, "data.where=width>=250", cwd=home, expect=2)
    assert "data.where was width>=250 and duplicate_rank == 0 and n in [0, 1, 2, 3, 6]" in said
    config = (home / "runs/a/config.yaml").read_text()
    assert re.search(
        r"where: width>=250 and duplicate_rank == 0 and n in \[0, 1, 2, 3, 6\]", config
    )
    images = open_local_images(
        str(home / "scored"), 16, where="duplicate_rank > 0", on_error="skip"
    )
    assert len(images) == 2


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("data.where=width>=250 adn n>1", 'data.where="width>=250 adn n>1": invalid syntax at'),
        ("data.where=__import__('os').remove('x')", "functions are not called"),
        ("+data.val_where=n > 'a", "unterminated string literal"),
        ("data.where=7", "this is no condition of the grammar"),
        ("data.where=widht>1", "no json has the key widht - did you mean width?"),
    ],
)
def test_a_wrong_condition_is_refused_in_a_line(home, word, said):
    words = (TRAIN, "name=b", *TINY, "data.train=scored", "data.val=scored", word)
    told = run(*words, cwd=home, expect=2)
    assert said in told
    assert "Traceback" not in told
    assert not (home / "runs" / "b").exists()


def test_the_conditions_of_a_sweep_are_split_at_commas_outside_of_brackets():
    text = "a>1,n in [1, 2] and b == 'x,y',key(\"c,d\") > 1"
    assert split_conditions(text) == ["a>1", "n in [1, 2] and b == 'x,y'", 'key("c,d") > 1']


@pytest.mark.slow
def test_a_sweep_compares_conditions(home):
    where = "data.where=n in [0, 1, 2, 3],key('width') >= 250 and clip > -2"
    run(
        TRAIN,
        "-m",
        "name=s",
        *TINY,
        "data.train=scored",
        "data.val=scored",
        where,
        *SKIPPING,
        cwd=home,
    )
    sizes = [
        len(
            open_local_images(
                str(home / "scored"), 16, where=job.read_text().split("where: ")[1].splitlines()[0]
            )
        )
        for job in sorted((home / "runs/s").glob("*/config.yaml"))
    ]
    assert sorted(sizes) == [4, 9]
