"""Quality curves: the metrics of one model at several settings, as files and as a table.

A point is a dictionary of plain values with `varied` (setting -> value as typed), `metrics`, and
what else ldm.evaluate knows of the measurement.
"""

import csv
import itertools
import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from io import StringIO
from pathlib import Path

from ldm.utils.files import read_json, write_text
from ldm.utils.text import format_csv_cell, format_table

CURVE_TABLE_METRICS = ("scene_accuracy", "clip_score", "precision", "recall", "cmmd", "kid")
CURVE_FILE_TYPES = ("json", "csv", "png")
UNREADABLE = (OSError, ValueError, TypeError, KeyError)  # errors of a file that is no curve
CurvePoints = Sequence[dict]


def write_curve(points: CurvePoints, out: Path, *, metric: str | None = None) -> list[Path]:
    """Writes curve_<what varies>.json with all facts, .csv with the metrics, and .png.

    metric: of the first panel; None: as `plot_quality_curve` chooses. A former curve with points
    that the new one lacks gets another name, which is printed.
    """
    from ldm.experiments.plots import plot_quality_curve, render_figure
    from ldm.utils.images import save_png

    json_file, csv_file, png_file = files = _curve_files(points, out)
    back_up_curve(json_file, points)
    write_text(json_file, json.dumps(list(points), indent=1) + "\n")
    text = StringIO(newline="")
    table = [[format_csv_cell(value) for value in row] for row in list_curve_rows(points)]
    csv.writer(text, lineterminator="\n").writerows(table)
    write_text(csv_file, text.getvalue())
    figure = plot_quality_curve({"": points}, metric=metric)
    save_png(render_figure(figure), png_file, {"points": len(points)})
    return files


def _curve_files(points: CurvePoints, out: Path) -> list[Path]:
    names = sorted({key.partition(".")[0] for key in points[0]["varied"]})
    return [out / f"{'_'.join(['curve', *names])}.{kind}" for kind in CURVE_FILE_TYPES]


def check_curve_files(points: CurvePoints, out: Path) -> None:
    """Raises ValueError if a file in `out` has the name of this curve's and is no curve."""
    files = _curve_files(points, out)
    if existing := [path for path in files if path.exists()]:
        try:
            _collect_settings(json.loads(files[0].read_text()))
        except UNREADABLE as error:
            raise ValueError(f"{existing[0]} is no curve") from error


def back_up_curve(json_file: Path, points: CurvePoints) -> None:
    """Renames the former curve unless the new one has all its points; prints the new name."""
    try:
        former = json.loads(json_file.read_text())
        if not _collect_settings(former) - _collect_settings(points):
            return
    except UNREADABLE:
        return
    name = f"former_{json_file.stem}-{blake2b(json_file.read_bytes(), digest_size=4).hexdigest()}"
    for kind in CURVE_FILE_TYPES:
        if (path := json_file.with_suffix(f".{kind}")).exists():
            path.replace(path.with_name(f"{name}.{kind}"))
    print(f"the former {json_file.stem} ({len(former)} points of other settings) is kept as {name}")


def _collect_settings(points: CurvePoints) -> set[str]:
    """Returns how the points were measured, without the results."""
    settings = ([p["varied"], p.get("settings"), p.get("digest")] for p in points)
    return {json.dumps(each, sort_keys=True) for each in settings}


def list_curve_rows(points: CurvePoints) -> list[list]:
    """Returns a header and a row per point: settings, metrics, and the ends of their intervals."""
    first = points[0]
    names = list(first.get("intervals", {}))
    ends = [f"{name}_{end}" for name in names for end in ("low", "high")]
    rows = [[*first["varied"], *first["metrics"], *ends]]
    for point in points:
        ends = itertools.chain(*(point["intervals"][name] for name in names))
        rows.append([*point["varied"].values(), *point["metrics"].values(), *ends])
    return rows


def read_curves(run_dir: Path) -> dict[str, CurvePoints]:
    """Returns the curves in a folder by the stem of their files; ValueError for other content."""
    curves = {}
    for path in sorted(run_dir.glob("curve_*.json")):
        try:
            points = read_json(path)
            if not points or not all(map(is_curve_point, points)):
                raise ValueError("without points")
            if any(point["metrics"].keys() != points[0]["metrics"].keys() for point in points):
                raise ValueError("its points have different metrics")
            make_comparison_key(points)
        except (*UNREADABLE, AttributeError) as error:
            raise ValueError(
                f"{path} is no curve of ldm.evaluate ({error!r}): delete it"
            ) from error
        curves[path.stem] = points
    return curves


def is_curve_point(point: dict) -> bool:
    """Returns whether it has what a plot of a curve needs."""
    intervals = point.get("intervals", {}).values()
    tables = [point["metrics"], point.get("floor", {}), point.get("own", {})]
    numbers = [*itertools.chain(*(table.values() for table in tables), *intervals)]
    return (
        bool(point["varied"] and point["metrics"])
        and all(isinstance(each, int | float) and not abs(each) >= 1e30 for each in numbers)
        and all(len(ends) == 2 for ends in intervals)
        and all(isinstance(value, str) for value in point["varied"].values())
    )


def make_comparison_key(points: CurvePoints) -> str:
    """Returns what two curves of one plot must share: settings varied, images, networks."""
    first = points[0]
    sampled = {name: first["settings"].get(name) for name in ("count", "seed", "size")}
    return json.dumps([sorted(first["varied"]), first.get("protocol"), sampled], sort_keys=True)


def select_distance_metric(metrics: Mapping[str, float]) -> str | None:
    """Returns the Frechet distance to show: FID, or the first of another network."""
    names = [name for name in metrics if name.startswith("fd_") and not name.endswith("_floor")]
    return "fid" if "fid" in metrics else next(iter(names), None)


def format_curve_table(points: CurvePoints, *, metric: str | None = None) -> str:
    """Returns a row per point: the settings, then `metric` and the metrics of most interest."""
    first = points[0]
    wanted = [metric, select_distance_metric(first["metrics"]), *CURVE_TABLE_METRICS]
    names = [name for name in dict.fromkeys(wanted) if name and name in first["metrics"]]
    lines = [[*first["varied"], *names]]
    for point in points:
        lines.append([*point["varied"].values(), *(f"{point['metrics'][n]:.4g}" for n in names)])
    return format_table(lines, align=">")
