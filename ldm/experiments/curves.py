"""Metrics of one model under several settings: files, a table, and what may stand in one picture.

A point is a dictionary of plain values with `varied` (setting -> value as given), `metrics`, and
what ldm.evaluate knows beside them.
"""

import csv
import itertools
import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from io import StringIO
from pathlib import Path

from ldm.utils.files import read_regular_file, write_text
from ldm.utils.text import format_csv_cell, format_table

CURVE_TABLE_METRICS = ("scene_accuracy", "clip_score", "precision", "recall", "cmmd", "kid")
MAX_CURVE_BYTES = 2**26  # bytes of a file of points
CurvePoints = Sequence[dict]


def write_curve(points: CurvePoints, out: Path, *, metric: str | None = None) -> list[Path]:
    """curve_<what varies>.json with all that is known, .csv with the metrics, .png.

    metric: what is drawn first against a length; None: as `curve_figures` chooses. Files of points
    that are not all measured again are kept under another name, which is printed.
    """
    from ldm.experiments.curve_plots import render_quality_curve
    from ldm.utils.images import save_png

    json_file, csv_file, png_file = (
        out / f"{_curve_stem(points)}.{kind}" for kind in CURVE_FILE_TYPES
    )
    back_up_curve(json_file, points)
    write_text(json_file, json.dumps(list(points), indent=1) + "\n")
    text = StringIO(newline="")
    table = [[format_csv_cell(value) for value in row] for row in list_curve_rows(points)]
    csv.writer(text, lineterminator="\n").writerows(table)
    write_text(csv_file, text.getvalue())
    save_png(render_quality_curve({"": points}, metric=metric), png_file, {"points": len(points)})
    return [json_file, csv_file, png_file]


CURVE_FILE_TYPES = ("json", "csv", "png")


def check_curve_files(points: CurvePoints, out: Path) -> None:
    """ValueError where a file in `out` has the name of these points' curve, and is none."""
    json_file, *others = (out / f"{_curve_stem(points)}.{kind}" for kind in CURVE_FILE_TYPES)
    if not (there := [path for path in (json_file, *others) if path.exists()]):
        return
    try:
        _collect_settings(json.loads(json_file.read_text()))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{there[0]} is no curve") from error


def back_up_curve(json_file: Path, points: CurvePoints) -> None:
    """Rename the curve that is there, unless the new one has all its points; say so."""
    try:
        former = json.loads(json_file.read_text())
        lost = _collect_settings(former) - _collect_settings(points)
    except (OSError, ValueError, TypeError, KeyError):  # none, or none that can be read
        return
    if not lost:
        return
    name = f"former_{json_file.stem}-{blake2b(json_file.read_bytes(), digest_size=4).hexdigest()}"
    for kind in CURVE_FILE_TYPES:
        if (path := json_file.with_suffix(f".{kind}")).exists():
            path.replace(path.with_name(f"{name}.{kind}"))
    print(f"the former {json_file.stem} ({len(former)} points of other settings) is kept as {name}")


def _collect_settings(points: CurvePoints) -> set[str]:
    """What the points were measured with, without what came of it."""
    asked = ([p["varied"], p.get("settings"), p.get("digest")] for p in points)
    return {json.dumps(each, sort_keys=True) for each in asked}


def _curve_stem(points: CurvePoints) -> str:
    names = sorted({key.partition(".")[0] for key in points[0]["varied"]})
    return "_".join(["curve", *names])


def list_curve_rows(points: CurvePoints) -> list[list]:
    """A header, then a row a point: what was varied, the metrics, and their intervals' ends."""
    varied, metrics = (list(points[0][name]) for name in ("varied", "metrics"))
    ends = list(points[0].get("intervals", {}))
    found = [[*varied, *metrics, *(f"{name}_{end}" for name in ends for end in ("low", "high"))]]
    for point in points:
        between = [end for name in ends for end in point["intervals"][name]]
        found.append([*point["varied"].values(), *point["metrics"].values(), *between])
    return found


def read_curves(run_dir: Path) -> dict[str, CurvePoints]:
    """The curves in a folder, by the name of their files.

    Raises ValueError where a file holds something else.
    """
    found = {}
    for path in sorted(run_dir.glob("curve_*.json")):
        try:
            points = json.loads(read_regular_file(path, max_bytes=MAX_CURVE_BYTES))
            if not points or not all(map(is_curve_point, points)):
                raise ValueError("without points")
            if any(point["metrics"].keys() != points[0]["metrics"].keys() for point in points):
                raise ValueError("its points have different metrics")
            make_comparison_key(points)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
            raise ValueError(
                f"{path} is no curve of ldm.evaluate ({error!r}): delete it"
            ) from error
        found[path.stem] = points
    return found


def is_curve_point(point: dict) -> bool:
    """Whether it has what a picture of a curve is made of."""
    between = point.get("intervals", {})
    tables = [point["metrics"], point.get("floor", {}), point.get("own", {})]
    numbers = [*itertools.chain(*(table.values() for table in tables), *between.values())]
    return (
        bool(point["varied"] and point["metrics"])
        and all(isinstance(each, int | float) and not abs(each) >= 1e30 for each in numbers)
        and all(len(ends) == 2 for ends in between.values())
        and all(isinstance(value, str) for value in point["varied"].values())
    )


def make_comparison_key(points: CurvePoints) -> str:
    """What two curves must share to stand in one picture: settings varied, pictures, networks."""
    first = points[0]
    drawn = {name: first["settings"].get(name) for name in ("count", "seed", "size")}
    return json.dumps([sorted(first["varied"]), first.get("protocol"), drawn], sort_keys=True)


def select_distance_metric(metrics: Mapping[str, float]) -> str | None:
    """The Frechet distance to show: FID, or the first of another network."""
    names = [name for name in metrics if name == "fid" or name.startswith("fd_")]
    names = [name for name in names if not name.endswith("_floor")]
    return "fid" if "fid" in names else next(iter(names), None)


def format_curve_table(points: CurvePoints, *, metric: str | None = None) -> str:
    """A row a point: what was varied, then `metric` and those that are looked at first."""
    shown = [metric, select_distance_metric(points[0]["metrics"]), *CURVE_TABLE_METRICS]
    names = [name for name in dict.fromkeys(shown) if name in points[0]["metrics"]]
    lines = [[*points[0]["varied"], *names]]
    for point in points:
        lines.append([*point["varied"].values(), *(f"{point['metrics'][n]:.4g}" for n in names)])
    return format_table(lines, align=">")
