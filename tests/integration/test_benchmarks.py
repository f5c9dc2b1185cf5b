"""The scripts in benchmarks/ run, with tiny sizes, and write what they found."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PICTURES = ROOT.parent / "shared" / "data" / "coco_mini"
needs_pictures = pytest.mark.skipif(not PICTURES.is_dir(), reason="COCO's pictures are not here")
BENCHMARKS = ["train_step", "sample", "data", "framework", "startup", "memory", "scaling"]
BENCHMARKS += ["evaluation", "caching", "cached_step"]


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(ROOT)


def run(name, out, *words):
    import_module(f"benchmarks.{name}").main(["--quick", "--rounds", "1", f"--out={out}", *words])
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", BENCHMARKS)
def test_help_shows_commands_that_work(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        import_module(f"benchmarks.{name}").main(["--help"])
    said = capsys.readouterr().out
    assert f"python -m benchmarks.{name} --quick" in said
    for option in ("--rounds", "--out"):
        assert option in said


def test_a_training_step_and_sampling_are_compared_with_diffusers(tmp_path):
    for name in ("train_step", "sample"):
        found = run(name, tmp_path / f"{name}.json")
        (rows,) = found["tables"].values()
        assert [row["ratio"] for row in rows if row["variant"] == "diffusers float32"] == [1.0]
        assert {"ldm float32", "ldm bfloat16"} < {row["variant"] for row in rows}
        assert all(row["ms"] > 0 and len(row["_ms"]) == 1 for row in rows)
    errors = {row["variant"]: row["error"] for row in rows}
    assert errors["ldm float32"] < 1e-5 < errors["ldm bfloat16"]


@needs_pictures
def test_loading_is_compared_with_webdataset(tmp_path):
    found = run("data", tmp_path / "found.json", "--case=256-256", "--workers=1")
    assert list(found["tables"]) == ["loading, 256-256, 0 workers", "loading, 256-256, 1 workers"]
    for rows in found["tables"].values():
        assert [row["variant"] for row in rows] == ["webdataset", "ldm", "ldm, cached"]


def test_the_framework_is_compared_with_a_bare_loop(tmp_path):
    found = run("framework", tmp_path / "found.json", "--workers=0")
    costs, hooks = found["tables"].values()
    assert [row["what"] for row in costs] == ["the bare loop", "train.py", "the difference"]
    parts = import_module("benchmarks.framework").PARTS  # their work is found in both
    assert {row["hook"] for row in hooks[1:] if row["bare"]} == set(parts.values())


def test_processes_are_measured(tmp_path):
    rows = run("startup", tmp_path / "s.json", "--only=pass")["tables"]["start-up"]
    assert 0 < rows[0]["CPU s"] < 5
    (rows,) = run("memory", tmp_path / "m.json", "--only=step, ldm")["tables"].values()
    assert 0.05 < rows[0]["GiB"] < 5


def test_series_have_an_exponent_and_a_picture(tmp_path):
    picture = tmp_path / "scaling.png"
    found = run("scaling", tmp_path / "found.json", "--only=pictures", f"--picture={picture}")
    assert [row["series"] for row in found["tables"]["exponents"]] == ["pictures"]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_writing_of_a_cache_is_compared_with_its_encoders(tmp_path):
    writing, flips, batches = run("caching", tmp_path / "found.json")["tables"].values()
    assert [row["variant"] for row in writing] == [
        "encoders",
        "main process of ldm cache",
        "ldm cache workers=0",
    ]
    assert flips[1]["value"] > flips[2]["value"]
    assert batches[-1]["apart"] == 0


def test_the_frechet_distance_is_that_of_torchmetrics_and_scipy(tmp_path):
    found = run("evaluation", tmp_path / "found.json", "--only=frechet,")
    rows = found["tables"]["Frechet distances"]
    assert len(rows) == 4
    assert all(row["relative difference"] < 1e-9 for row in rows)
    # What a reader needs to judge or to repeat the numbers.
    assert found["command"].startswith("python -m benchmarks.evaluation --quick")
    assert {"date", "commit", "versions", "machine", "rounds"} <= found.keys()
    assert found["machine"]["threads"] == 1


def test_a_power_law_is_found_again():
    harness = import_module("benchmarks.harness")
    assert harness.fit_exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


def test_a_slower_variant_has_a_ratio_below_one(tmp_path):
    harness = import_module("benchmarks.harness")
    rows = harness.compare({"base": [1.0, 2.0, 4.0], "slow": [2.0, 4.0, 9.0]}, base="base")
    assert [row["ratio"] for row in rows] == [1.0, 0.5]
    assert rows[1]["ms"] == 4000


def test_a_bad_option_gives_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.startup", "--only=nothing", "--quick"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "there is no such row. There are: python -c pass" in done.stderr
