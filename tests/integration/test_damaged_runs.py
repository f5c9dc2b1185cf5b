"""Run directories that are damaged, or a stranger's: each costs its own place alone."""

import csv
import json
import os
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_dirs import write_run
from shell import run

from ldm.cli.explain import TEXT_TO_IMAGE_TARGET, find_newest_run
from ldm.experiments.ranking import format_csv_table
from ldm.experiments.report import compare_runs
from ldm.utils.images import load_png, save_png
from ldm.utils.text import escape_control_characters, format_csv_cell

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
DEEP = "[" * 100_000
CURVE = {"varied": {"steps": "1"}, "metrics": {"fid": 1.0}, "settings": {"count": 8}}
# File, what it holds (None: a folder, ...: a pipe), and what is said.
DAMAGED = [
    ("config.yaml", BOMB, "it has a YAML alias"),
    ("config.yaml", DEEP, "is no YAML"),
    ("config.yaml", None, "is no file"),
    ("config.yaml", ..., "is no file"),
    ("config.yaml", "a: [", "is no YAML"),
    ("config.yaml", b"\x89PNG\xff\0", "codec can't decode byte"),
    ("config.yaml", "- a\n- b", "it is no mapping, but of type list"),
    ("config.yaml", "1: {2: 3}\nnull: x\ndata: {batch_size: many}", "is no text"),
    ("config.yaml", "data: 3", "data holds no settings, but int"),
    ("config.yaml", "a: " + "9" * 5000, "is no YAML"),
    ("config.yaml", "a: 2024-13-45", "is no YAML"),
    ("config.yaml", "x: !!python/object/apply:os.system [touch pwned]", "is no YAML"),
    ("config.yaml", "#" * 2**19, "262144 are the most"),
    (".hydra/hydra.yaml", BOMB, "it has a YAML alias"),
    (".hydra/hydra.yaml", "hydra: {runtime: {choices: [a]}}", "choices holds no settings"),
    (".hydra/hydra.yaml", ..., "is no file"),
    ("result.json", "{", "is no JSON"),
    ("result.json", DEEP, "is no JSON"),
    ("result.json", "[]", "holds no settings, but list"),
    ("result.json", None, "is no file"),
    ("result.json", ..., "is no file"),
    ("result.json", b"\xff\xfe\x00", "is no JSON"),
    ("metrics.csv", None, "is no file"),
    ("metrics.csv", ..., "is no file"),
    ("metrics.csv", b"\xff\xfe,\x00\n1,2\n", "codec can't decode"),
    ("metrics.csv", "step,a\n1," + "x" * 200_000 + "\n", "is no CSV"),
]
# What is odd and can be ranked all the same, and what is said of it, if anything.
ODD = [
    ("config.yaml", 'metric: [a, b]\nseed: "\\ud83d"', ""),
    ("result.json", '{"status": ["a"], "seconds": "long", "steps": null, "error": 5}', ""),
    ("result.json", '{"status": "failed", "error": "half an emoji \\ud83d \\u001b[31m"}', ""),
    ("metrics.csv", "", ""),
    ("metrics.csv", "step,val/loss,images_seen\n1,1e999,nan\n2,nan,inf\nnan,1,2\n", ""),
    ("metrics.csv", "step,val/loss,images_seen\n1e300,1,2\n3,1e308,-1e308\n4,9e99,1e200\n", ""),
    ("metrics.csv", "step,val/loss\n1\n2,3,4,5\n\n,,\nx,y\n", ""),
    (".lock", ..., ""),
    (".lock", None, ""),
    ("samples/step=00000020.png", ..., "is no PNG"),
    ("samples/step=00000020.png", None, "is no PNG"),
    ("samples/step=00000020.png", "not at all", "is no PNG"),
    ("curve_steps.json", "{}", "is no curve"),
    ("curve_steps.json", DEEP, "is no curve"),
    ("curve_steps.json", ..., "is no curve"),
    ("curve_steps.json", json.dumps([CURVE | {"metrics": {"fid": "low"}}]), "is no curve"),
    ("curve_steps.json", json.dumps([CURVE | {"intervals": {"fid": [1]}}]), "is no curve"),
    ("curve_steps.json", json.dumps([CURVE | {"floor": [1]}]), "is no curve"),
]


def put(path: Path, held) -> None:
    """A file that holds text or bytes, a folder for None, a pipe for `...`."""
    path.unlink(missing_ok=True)
    if held is None:
        path.mkdir(parents=True)
    elif held is ...:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(path)
    else:
        path.write_bytes(held if isinstance(held, bytes) else held.encode())


@pytest.fixture(autouse=True)
def patience():
    """A pipe that is waited for ends the test."""
    signal.alarm(120)
    yield
    signal.alarm(0)


@pytest.fixture
def damaged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_damaged_runs_are_named_and_the_others_ranked(damaged):
    write_run(Path("runs/good"), losses=[1, 0.5])
    for i, (name, held, _) in enumerate(DAMAGED):
        put(write_run(Path(f"runs/damaged{i:02}"), losses=[1, 0.5]) / name, held)
    for i, (name, held, _) in enumerate(ODD):
        put(write_run(Path(f"runs/odd{i:02}"), losses=[1, 0.5]) / name, held)
    said = compare_runs(sorted(Path("runs").iterdir()), out=Path("out"))
    lines = said.splitlines()
    for i, (name, _, why) in enumerate(DAMAGED):
        [line] = [line for line in lines if f"runs/damaged{i:02}" in line]
        assert why in line, (name, why)
        assert f"runs/damaged{i:02} is left out: " in line
    for i, (name, _, why) in enumerate(ODD):
        [*told] = [line for line in lines if f"runs/odd{i:02}" in line]
        assert len(told) == bool(why), (name, told)
        assert why in "".join(told)
    with Path("out/ranking.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert {row["run"] for row in table} == {"good", *(f"odd{i:02}" for i in range(len(ODD)))}
    assert not Path("pwned").exists()
    text = Path("out/ranking.md").read_text()
    assert "\x1b" not in text
    assert r"half an emoji \ud83d \x1b[31m" in text


def test_where_all_are_damaged_it_is_one_line(damaged):
    put(write_run(Path("runs/a"), losses=[1]) / "result.json", "{")
    said = run("-m", "ldm.compare", "runs/a", cwd=damaged, expect=2)
    assert said.strip().startswith("python -m ldm.compare: runs/a is left out: ")
    assert "Traceback" not in said


def test_the_newest_run_is_found_among_damaged_ones(damaged):
    whole = {"stage": "diffusion", "task": {"_target_": TEXT_TO_IMAGE_TARGET}}
    write_run(Path("runs/good"), losses=[1], config=whole)
    for i, (name, held, _) in enumerate(DAMAGED):
        put(write_run(Path(f"runs/damaged{i:02}"), losses=[1]) / name, held)
    assert find_newest_run(Path("runs")) == Path("runs/good")


def test_a_file_that_is_no_ranking_is_not_replaced(damaged):
    place = write_run(Path("runs/a"), losses=[1])
    for name in ("ranking.md", "ranking.csv", "curves.png", "samples.png", "quality_x.png"):
        Path("out").mkdir(exist_ok=True)
        Path("out", name).write_text("mine")
        with pytest.raises(ValueError, match=rf"out/{name} is none of ldm.compare's: move it"):
            compare_runs([place], out=Path("out"))
        assert Path("out", name).read_text() == "mine"
        Path("out", name).unlink()
    Path("out/ranking.csv").write_text("mine")
    compare_runs([place], out=Path("out"), overwrite=True)
    compare_runs([place], out=Path("out"))
    assert Path("out/ranking.csv").read_text().startswith("rank,run,")


@pytest.mark.parametrize("text", ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1"])
def test_what_a_spreadsheet_would_run_is_text(text):
    assert format_csv_cell(text).startswith("'")
    assert format_csv_table(["a"], [[text], ["x" + text]]).splitlines()[1].lstrip('"')[0] == "'"


def test_numbers_and_words_are_left_as_they_are():
    values = ["-1", "+2.5e-3", "-.5", "-inf", "a=b", "", -1, -1.5, None, "scheduler=cosine"]
    assert [format_csv_cell(value) for value in values] == values


def test_what_a_terminal_would_obey_is_an_escape():
    assert escape_control_characters("a\x1b[2Jb\r\x07\u202e\u2028\ud83d é 雪 👩‍🚀") == (
        r"a\x1b[2Jb\r\x07\u202e\u2028\ud83d é 雪 👩‍🚀"
    )
    assert escape_control_characters("a\nb\tc", keep="\n") == "a\nb\\tc"


@pytest.mark.parametrize("kind", ["GIF", "JPEG", "TIFF", "BMP", "PPM", "WEBP"])
def test_only_a_png_is_opened_as_one(tmp_path, kind):
    Image.new("RGB", (3, 2)).save(tmp_path / "a.png", kind)
    with pytest.raises(ValueError, match=r"a\.png is no PNG that can be read"):
        load_png(tmp_path / "a.png")


def test_a_damaged_png_is_named(tmp_path):
    save_png(Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)), tmp_path / "a", {})
    data = (tmp_path / "a").read_bytes()
    for i in range(0, len(data), 7):
        (tmp_path / "b").write_bytes(data[:i] + bytes([data[i] ^ 0xFF]) + data[i + 1 :])
        try:
            load_png(tmp_path / "b")
        except ValueError as error:
            assert "b is no PNG" in str(error)  # noqa: PT017
    chunk = b"IHDR" + (10**5).to_bytes(4) * 2 + b"\x08\x02\0\0\0"
    huge = data[:8] + (13).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4) + data[33:]
    (tmp_path / "b").write_bytes(huge)
    with pytest.raises(ValueError, match=r"b is no PNG .*decompression bomb"):
        load_png(tmp_path / "b")


def test_a_log_of_a_terabyte_costs_its_own_place_alone(damaged):
    """A file with holes takes no room on the disk, and all memory where it is read."""
    write_run(Path("runs/good"), losses=[1, 0.5])
    os.truncate(write_run(Path("runs/large"), losses=[1]) / "metrics.csv", 2**40)
    said = compare_runs(sorted(Path("runs").iterdir()), out=Path("out"))
    assert "1 run by val/loss" in said
    assert "runs/large is left out: runs/large/metrics.csv has more than" in said
