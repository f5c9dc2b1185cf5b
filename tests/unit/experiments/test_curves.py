"""Curves of ldm.evaluate: files, pictures, and runs beside one another."""

import csv
import itertools
import json
import math
from pathlib import Path

import pytest
from PIL import Image
from run_dirs import write_run

from ldm.cli.evaluate import format_image_table
from ldm.experiments.curves import format_curve_table, read_curves, write_curve
from ldm.experiments.plots import plot_quality_curve
from ldm.experiments.ranking import find_runs
from ldm.experiments.report import compare_runs

PROTOCOL = {"painted": 8, "real": 20, "floor": 8, "subset": "abc", "data": "def"}


def point(number: int, protocol: dict = PROTOCOL, **varied: str) -> dict:
    metrics = {"fd_clip": 10.0 + number, "fd_clip_floor": 4.0, "kid": -0.0001}
    metrics |= {"clip_score": 30.0 - number**2, "clip_score_real": 33.0, "clip_score_chance": 20.0}
    return {
        "varied": varied,
        "metrics": metrics,
        "intervals": {"fd_clip": [9.0 + number, 12.0 + number], "clip_score": [0.0, 60.0]},
        "floor": {"fd_clip": 4.0, "kid": 0.0},
        "settings": {"count": 8, "seed": 0, "size": 16, "steps": int(varied.get("steps", 3))},
        "protocol": protocol,
    }


def guided(scales: list[str], **changes) -> list[dict]:
    return [point(i, **changes, **{"guidance.scale": scale}) for i, scale in enumerate(scales)]


STEPS = [
    point(i, steps=steps, sampler=sampler)
    for i, (steps, sampler) in enumerate(itertools.product(["20", "5"], ["ddim", "ddpm"]))
]


def lines(axes) -> dict[str, tuple[list, list]]:
    found = {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines
    }
    return {name: line for name, line in found.items() if not name.startswith("_")}


def test_distance_is_drawn_against_clip_score_in_the_order_of_the_scales():
    [axes] = plot_quality_curve({"": guided(["8", "1", "2"])}).axes
    assert axes.get_xlabel() == "CLIP score (higher is better)"
    assert axes.get_ylabel() == "Frechet distance, clip features (lower is better)"
    drawn = next(
        line for line in axes.lines if len(line.get_xdata()) == 3 and line.get_marker() == "o"
    )
    assert list(drawn.get_xdata()) == [29.0, 26.0, 30.0]  # scales 1, 2, 8
    assert list(drawn.get_ydata()) == [11.0, 12.0, 10.0]
    told = [text.get_text() for text in axes.texts]
    assert told == ["1", "2", "8", "real images"]
    assert any(list(line.get_ydata()) == [4.0, 4.0] for line in axes.lines), "the floor"


def test_quality_is_drawn_against_steps_a_line_a_sampler():
    far, score = plot_quality_curve({"": STEPS}).axes
    assert (far.get_xlabel(), score.get_xlabel()) == ("steps", "steps")
    assert far.get_xscale() == "log"
    assert [tick.get_text() for tick in far.get_xticklabels()] == ["5", "20"]
    assert lines(far) == {"ddim": ([5.0, 20.0], [12.0, 10.0]), "ddpm": ([5.0, 20.0], [13.0, 11.0])}
    assert lines(score)["ddpm"] == ([5.0, 20.0], [21.0, 29.0])
    assert any(list(line.get_ydata()) == [33.0, 33.0] for line in score.lines), "real images"


@pytest.mark.parametrize(
    ("varied", "kept", "panels"),
    [
        (["guidance.scale=1,3"], {"scene_accuracy"}, [("guidance.scale", "scene accuracy")]),
        (["sampler=ddim,ddpm"], {"fd_clip"}, [("sampler", "Frechet distance, clip features")]),
        (["sampler=ddim,ddpm"], {"fid", "clip_score"}, [("CLIP score", "FID")]),
    ],
)
def test_other_curves_find_their_axes(varied, kept, panels):
    (name, values) = varied[0].split("=")
    points = [point(i, **{name: value}) for i, value in enumerate(values.split(","))]
    for one in points:
        every = {**one["metrics"], "scene_accuracy": 0.5, "fid": 3.0}
        one["metrics"] = {key: value for key, value in every.items() if key in kept}
    found = plot_quality_curve({"": points}).axes
    words = [(axes.get_xlabel(), axes.get_ylabel()) for axes in found]
    assert [(x.partition(" (")[0], y.partition(" (")[0]) for x, y in words] == panels


def test_metrics_are_drawn_against_lengths_beside_what_was_trained():
    points = [point(i, length=length) for i, length in enumerate(["0.2", "0.05"])]
    points = [{**one, "own": {"fd_clip": 9.5, "kid": 0.1}} for one in points]
    kid, far, score = plot_quality_curve({"": points}, metric="kid").axes
    assert [axes.get_xlabel() for axes in (kid, far, score)] == ["length"] * 3
    assert [axes.get_ylabel().split()[0] for axes in (kid, far, score)] == [
        "kid",
        "Frechet",
        "CLIP",
    ]
    drawn = next(line for line in far.lines if line.get_marker() == "o")
    assert [*drawn.get_xdata()] == [0.05, 0.2]
    assert [*drawn.get_ydata()] == [11.0, 10.0]
    assert any([*line.get_ydata()] == [9.5, 9.5] for line in far.lines)
    assert "as trained" in [text.get_text() for text in far.texts]
    assert "as trained" not in [text.get_text() for text in score.texts], "it was not measured"
    assert format_curve_table(points, metric="precision") == format_curve_table(points)
    assert format_curve_table(points, metric="kid").split()[1] == "kid"


def test_lines_and_their_intervals_stand_beside_one_another():
    far, _ = plot_quality_curve({"": STEPS}).axes
    low, high = far.get_ylim()
    assert low < 9, "all intervals are in the picture"
    assert 15 < high < 18
    places = []  # of the bars at 20 steps, in pixels
    for container in far.containers:
        [bars] = container[2]
        [bar] = [ends for ends in bars.get_segments() if ends[0][0] == 20]
        places.append(bars.get_transform().transform(bar)[0][0])
    assert 3 < places[1] - places[0] < 12
    drawn = [line for line in far.lines if line.get_label() in ("ddim", "ddpm")]
    points = [line.get_transform().transform((20, 10))[0] for line in drawn]
    assert points == pytest.approx(places), "a bar goes through its point"


def test_what_is_nought_everywhere_is_left_out():
    points = [
        {**one, "metrics": {**one["metrics"], "scene_accuracy": 0.0}} for one in guided(["1", "3"])
    ]
    assert [axes.get_xlabel() for axes in plot_quality_curve({"": points}).axes] == [
        "CLIP score (higher is better)"
    ]
    for kept, shown in {
        ("fd_clip", "scene_accuracy"): "Frechet",
        ("scene_accuracy",): "scene",
    }.items():
        some = [{**one, "metrics": {k: one["metrics"][k] for k in kept}} for one in points]
        [axes] = plot_quality_curve({"": some}).axes
        assert axes.get_xlabel() == "guidance.scale"
        assert axes.get_ylabel().startswith(shown), "there is nothing else"


def test_files_hold_all_that_is_known(tmp_path):
    files = write_curve(STEPS, tmp_path)
    assert [path.name for path in files] == [
        "curve_sampler_steps.json", "curve_sampler_steps.csv", "curve_sampler_steps.png",
    ]  # fmt: skip
    with files[1].open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:3] == ["steps", "sampler", "fd_clip"]
    first = [[row["steps"], row["sampler"], row["fd_clip"]] for row in rows[:2]]
    assert first == [["20", "ddim", "10.0"], ["20", "ddpm", "11.0"]]
    assert (rows[1]["fd_clip_low"], rows[1]["fd_clip_high"]) == ("10.0", "13.0")
    assert all(math.isfinite(float(v)) for row in rows for k, v in row.items() if k != "sampler")
    with Image.open(files[2]) as image:
        assert image.width > 600
    assert read_curves(tmp_path) == {"curve_sampler_steps": STEPS}
    write_curve(guided(["1", "2"]), tmp_path)
    assert set(read_curves(tmp_path)) == {"curve_sampler_steps", "curve_guidance"}


def test_points_that_are_not_measured_again_are_kept(tmp_path, capsys):
    write_curve(guided(["1", "2", "4"]), tmp_path)
    write_curve(guided(["1", "2", "4", "8"]), tmp_path)
    assert not list(tmp_path.glob("former_*")), "all of it is there again"
    write_curve(guided(["3"]), tmp_path)
    [told] = capsys.readouterr().out.splitlines()
    assert told.startswith("the former curve_guidance (4 points of other settings) is kept as ")
    kept = sorted(path.name for path in tmp_path.glob(f"{told.split()[-1]}.*"))
    assert [name.rpartition(".")[2] for name in kept] == ["csv", "json", "png"]
    assert len(json.loads((tmp_path / kept[1]).read_text())) == 4
    assert read_curves(tmp_path) == {"curve_guidance": guided(["3"])}


@pytest.mark.parametrize("text", ["", "[]", "{}", "[1]", '[{"varied": {}, "metrics": {}}]'])
def test_a_file_that_is_no_curve_is_named(tmp_path, text):
    (tmp_path / "curve_steps.json").write_text(text)
    with pytest.raises(ValueError, match=r"curve_steps.json is no curve of ldm.evaluate"):
        read_curves(tmp_path)


def test_the_table_has_a_row_a_point():
    rows = format_curve_table(STEPS).splitlines()
    assert rows[0].split() == ["steps", "sampler", "fd_clip", "clip_score", "kid"]
    assert rows[-1].split() == ["5", "ddpm", "13", "21", "-0.0001"]
    assert len({len(row) for row in rows}) == 1


def test_real_pictures_and_chance_stand_beside_a_metric():
    rows = format_image_table(point(1)).splitlines()
    assert rows[1].split() == ["fd_clip", "11", "10", "..", "13", "4"]
    assert rows[3].split() == ["clip_score", "29", "0", "..", "60", "33", "20"]
    assert rows[2].split() == ["kid", "-1.0e-04", "0"]
    assert "8 images against 20 real ones" in rows[-1]


def test_each_number_of_an_own_metric_has_a_row():
    facts = point(1, {**PROTOCOL, "metrics": ["colour", "scene_depth"]})
    facts["metrics"] |= {"colour_generated": 23.0, "colour_real": 61.0, "scene_depth": 2.0}
    names = [row.split()[0] for row in format_image_table(facts).splitlines()[1:-1]]
    assert names[3:] == ["colour_generated", "colour_real", "scene_depth"]


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    places = [write_run(tmp_path / "runs" / name, losses=[1, 0.5]) for name in "abcd"]
    for place, scales in zip(places, (["1", "3"], ["1", "2", "5"], ["1", "3"]), strict=False):
        other = {} if place.name != "c" else {"protocol": {**PROTOCOL, "painted": 500}}
        write_curve(guided(scales, **other), place)
    return places


def test_compare_draws_curves_of_several_runs_in_one_picture(runs, tmp_path):
    said = compare_runs(find_runs(runs), out=tmp_path)
    assert "quality_guidance.png: curve_guidance of a, b; c: of other images" in said
    assert str(tmp_path / "quality_guidance.png") in said
    with Image.open(tmp_path / "quality_guidance.png") as image:
        assert json.loads(image.text["runs"]) == ["a", "b"]
    shown = plot_quality_curve(
        {name: read_curves(tmp_path / "runs" / name)["curve_guidance"] for name in "ab"}
    )
    assert {name: len(xs) for name, (xs, _) in lines(shown.axes[0]).items()} == {"a": 2, "b": 3}


def test_compare_says_where_curves_cannot_stand_together(runs, tmp_path):
    said = compare_runs(find_runs([runs[0], runs[2], runs[3]]), out=tmp_path)
    assert "not in one plot: curve_guidance of a; c: of other images, networks" in said
    assert not (tmp_path / "quality_guidance.png").exists()
    alone = compare_runs(find_runs([runs[0], runs[3]]), out=tmp_path)
    assert "curve_guidance" not in alone
