"""Runs beside one another: what differs, who is best, and pictures that show the same things."""

import csv

import pytest
import torch
from PIL import Image
from run_dirs import write_run
from shell import run

from ldm.experiments.plots import plot_metric_curves
from ldm.experiments.ranking import (
    find_runs,
    list_ranking_caveats,
    read_run_record,
    shorten_run_names,
)
from ldm.experiments.report import compare_runs
from ldm.utils.images import load_png, make_image_grid, split_image_grid


@pytest.fixture
def sweep(tmp_path):
    sweep = tmp_path / "runs" / "mine"
    write_run(sweep / "scheduler=linear", losses=[1, 0.5], choices={"scheduler": "linear"})
    write_run(sweep / "scheduler=cosine", losses=[1, 0.25], config={"seed": 3, "direction": "x"})
    write_run(sweep / "scheduler=none", losses=[1], status="failed")
    write_run(sweep / "scheduler=new", losses=[], status=None)
    return sweep


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_best_stands_first_and_what_failed_last(sweep):
    said = compare_runs(find_runs([sweep]), out=sweep)
    table = read(sweep / "ranking.csv")
    runs = ["scheduler=cosine", "scheduler=linear", "scheduler=new", "scheduler=none"]
    assert [row["run"] for row in table] == runs
    assert [row["state"] for row in table] == ["finished", "finished", "interrupted", "failed"]
    assert table[0]["directory"].endswith("runs/mine/scheduler=cosine")
    assert table[3]["error"] == "ValueError: no | good"
    assert [row["scheduler"] for row in table] == ["cosine", "linear", "cosine", "cosine"]
    assert [row["seed"] for row in table] == ["3", "", "", ""]
    assert "direction" not in table[0], "it follows from the metric"
    assert [row["val/loss"] for row in table] == ["0.25", "0.5", "", "1.0"]
    assert table[0]["images_seen"] == "80"
    assert table[0]["images/s"] == "100.5"
    assert table[0]["seconds"] == "3.5"
    text = (sweep / "ranking.md").read_text()
    assert "# 4 runs by val/loss (minimize)" in text
    assert "ValueError: no | good" in text
    assert all(
        line.count("|") == text.splitlines()[2].count("|") for line in text.splitlines()[2:8]
    )
    assert "samples.png" in said

    compare_runs(find_runs([sweep]), out=sweep, direction="maximize")
    assert read(sweep / "ranking.csv")[0]["run"] == "scheduler=linear"


def test_what_is_the_same_for_all_weights_is_left_to_the_csv_file(tmp_path):
    values = {"val/fd_clip": 9, "val/clip_score": 30}
    constant = {"val/fd_clip_floor": 4, "val/clip_score_real": 33, "val/clip_score_chance": 20}
    for name in "ab":
        write_run(tmp_path / name, losses=[1, 2], measured=values | constant)
    said = compare_runs(find_runs([tmp_path]), out=tmp_path / "out")
    [header] = [line for line in said.splitlines() if line.startswith("| rank")]
    words = header.replace("|", " ").split()
    assert [word for word in words if word.startswith("val/")] == [
        "val/loss", "val/fd_clip", "val/clip_score",
    ]  # fmt: skip
    with (tmp_path / "out" / "ranking.csv").open() as file:
        [row, _] = csv.DictReader(file)
    assert [row[name] for name in ("val/fd_clip_floor", "val/clip_score_real")] == ["4.0", "33.0"]
    with Image.open(tmp_path / "out" / "curves.png") as picture:
        size = picture.size
    two = [(name, [(0, 1.0), (1, 2.0)]) for name in "ab"]
    assert plot_metric_curves(dict.fromkeys(("val/loss", *values), two)).size == size, "three"


@pytest.mark.parametrize(
    ("measured", "told"),
    [
        (None, "look at the samples."),
        ({}, "look at the samples."),
        ({"val/loss_t0": 1}, "look at the samples."),
        ({"val/scene_accuracy": 0.5, "val/fid": 3}, "as metric=val/scene_accuracy does."),
        ({"val/fid_floor": 2, "val/fid": 3, "val/clip_score": 20}, "as metric=val/fid does."),
        ({"val/fd_clip_floor": 2, "val/fd_clip": 3}, "as metric=val/fd_clip does."),
    ],
)
def test_only_what_was_measured_is_advised(tmp_path, measured, told):
    for name in ("linear", "cosine"):
        losses = [] if measured is None else [1]  # none: it has not come so far
        write_run(tmp_path / name, losses=losses, choices={"scheduler": name}, measured=measured)
    found = [read_run_record(place) for place in find_runs([tmp_path])]
    [doubt] = list_ranking_caveats(found, "val/loss")
    assert "another scheduler" in doubt
    assert doubt.endswith(told)
    assert not list_ranking_caveats(found, "val/scene_accuracy")


def test_scenes_are_ranked_by_their_accuracy_where_every_run_measured_it(tmp_path):
    for name, accuracy in (("linear", 0.5), ("cosine", 0.25)):
        measured = {"val/scene_accuracy": accuracy}
        more = {"choices": {"scheduler": name}, "measured": measured}
        write_run(tmp_path / "runs" / name, losses=[0.5 if name == "linear" else 0.1], **more)
    said = compare_runs(find_runs([tmp_path / "runs"]), out=tmp_path / "out")
    assert "2 runs by val/scene_accuracy (maximize)" in said
    assert "weight errors differently" not in said
    assert [row["run"] for row in read(tmp_path / "out" / "ranking.csv")] == ["linear", "cosine"]
    said = compare_runs(find_runs([tmp_path / "runs"]), out=tmp_path / "out", metric="val/loss")
    assert "2 runs by val/loss (minimize)" in said
    write_run(tmp_path / "runs" / "early", losses=[3])
    assert "by val/loss" in compare_runs(find_runs([tmp_path / "runs"]), out=tmp_path / "out")


def test_the_page_of_samples_says_where_its_order_compares_nothing(tmp_path):
    heights = []
    for place, differs in (("same", False), ("other", True)):
        for name in ("linear", "cosine"):
            choices = {"scheduler": name} if differs else {}
            write_run(tmp_path / place / name, losses=[1], choices=choices)
        compare_runs(find_runs([tmp_path / place]), out=tmp_path / place)
        page = (tmp_path / place / "ranking.md").read_text()
        assert ("Runs with another scheduler weight errors differently" in page) == differs
        heights.append(load_png(tmp_path / place / "samples.png")[0].height)
    assert heights[0] < heights[1], "the heading has more lines"


def test_each_column_of_the_page_shows_one_prompt(sweep, tmp_path):
    write_run(sweep / "scheduler=other", losses=[1, 0.1], prompts=["a horse"])
    compare_runs(find_runs([sweep]), out=tmp_path / "out")
    page, facts = load_png(tmp_path / "out" / "samples.png")
    assert "scheduler=other" in facts["runs"]
    # Rows of runs begin at the left margin; each prompt's picture has one grey of its own.
    greys = [{page.getpixel((24 + i * 168 + 80, y)) for y in range(page.height)} for i in range(3)]
    for grey, wanted in zip(greys, (0, 128, 255), strict=True):
        assert (wanted,) * 3 in grey
    with Image.open(tmp_path / "out" / "curves.png") as curves:
        assert curves.width > 600


def test_pictures_are_cut_where_they_were_joined():
    for n in range(1, 12):
        images = [torch.full((3, 5, 4), i / 12) for i in range(n)]
        for columns in (None, 3):
            pieces = split_image_grid(make_image_grid(images, columns=columns), n, columns=columns)
            for image, piece in zip(images, pieces, strict=True):
                assert piece.size == (4, 5)
                assert piece.getpixel((2, 2)) == make_image_grid([image]).getpixel((0, 0))


def test_runs_from_anywhere_have_short_names(tmp_path):
    a = write_run(tmp_path / "x" / "runs" / "a", losses=[1])
    b = write_run(tmp_path / "y" / "runs" / "sweep" / "b=1", losses=[2])
    found = find_runs([a, tmp_path / "y", a])
    assert found == [a, b]
    assert shorten_run_names([read_run_record(d) for d in found]) == [
        "x/runs/a",
        "y/runs/sweep/b=1",
    ]


def test_the_command(sweep, tmp_path):
    said = run("-m", "ldm.compare", "runs/mine", cwd=tmp_path)
    assert "4 runs by val/loss" in said
    assert (sweep / "ranking.md").is_file()
    said = run("-m", "ldm.compare", "runs/mine", "metric=val/los", cwd=tmp_path, expect=2)
    assert "did you mean val/loss?" in said
    said = run("-m", "ldm.compare", "runs/nine", cwd=tmp_path, expect=2)
    assert "'runs/nine' is neither a run nor a folder with runs" in said
    said = run("-m", "ldm.compare", "--help", cwd=tmp_path)
    assert "metric=KEY" in said
