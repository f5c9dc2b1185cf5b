"""Metrics of one model under several settings: files, a table, and what may stand in one picture.

A point is a dictionary of plain values with `varied` (setting -> value as given), `metrics`, and
what ldm.evaluate knows beside them.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from io import StringIO
from pathlib import Path

from ldm.files import write_text

SHOWN = ("scene_accuracy", "clip_score", "precision", "recall", "cmmd", "kid")
Points = Sequence[dict]


def write(points: Points, out: Path, *, metric: str | None = None) -> list[Path]:
    """curve_<what varies>.json with all that is known, .csv with the metrics, .png.

    metric: what is drawn first against a length; None: as `curve_figures` chooses. Files of points
    that are not all measured again are kept under another name, which is printed.
    """
    from ldm import curve_figures
    from ldm.images import save_png

    json_file, csv_file, png_file = (out / f"{_stem(points)}.{kind}" for kind in FILES)
    keep_former(json_file, points)
    write_text(json_file, json.dumps(list(points), indent=1) + "\n")
    text = StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows(points))
    write_text(csv_file, text.getvalue())
    save_png(curve_figures.curve({"": points}, metric=metric), png_file, {"points": len(points)})
    return [json_file, csv_file, png_file]


FILES = ("json", "csv", "png")


def keep_former(json_file: Path, points: Points) -> None:
    """Rename the curve that is there, unless the new one has all its points; say so."""
    try:
        former = json.loads(json_file.read_text())
        lost = _asked(former) - _asked(points)
    except (OSError, ValueError, TypeError, KeyError):  # none, or none that can be read
        return
    if not lost:
        return
    name = f"former_{json_file.stem}-{blake2b(json_file.read_bytes(), digest_size=4).hexdigest()}"
    for kind in FILES:
        if (path := json_file.with_suffix(f".{kind}")).exists():
            path.replace(path.with_name(f"{name}.{kind}"))
    print(f"the former {json_file.stem} ({len(former)} points of other settings) is kept as {name}")


def _asked(points: Points) -> set[str]:
    """What the points were measured with, without what came of it."""
    asked = ([p["varied"], p.get("settings"), p.get("digest")] for p in points)
    return {json.dumps(each, sort_keys=True) for each in asked}


def _stem(points: Points) -> str:
    names = sorted({key.partition(".")[0] for key in points[0]["varied"]})
    return "_".join(["curve", *names])


def rows(points: Points) -> list[list]:
    """A header, then a row a point: what was varied, the metrics, and their intervals' ends."""
    varied, metrics = (list(points[0][name]) for name in ("varied", "metrics"))
    ends = list(points[0].get("intervals", {}))
    found = [[*varied, *metrics, *(f"{name}_{end}" for name in ends for end in ("low", "high"))]]
    for point in points:
        between = [end for name in ends for end in point["intervals"][name]]
        found.append([*point["varied"].values(), *point["metrics"].values(), *between])
    return found


def read(run_dir: Path) -> dict[str, Points]:
    """The curves in a folder, by the name of their files.

    Raises ValueError where a file holds something else.
    """
    found = {}
    for path in sorted(run_dir.glob("curve_*.json")):
        try:
            points = json.loads(path.read_text())
            if not points or not all(point["varied"] and point["metrics"] for point in points):
                raise ValueError("without points")
            comparable(points)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is no curve of ldm.evaluate ({error!r}): delete it"
            ) from error
        found[path.stem] = points
    return found


def comparable(points: Points) -> str:
    """What two curves must share to stand in one picture: settings varied, pictures, networks."""
    first = points[0]
    drawn = {name: first["settings"].get(name) for name in ("count", "seed", "size")}
    return json.dumps([sorted(first["varied"]), first.get("protocol"), drawn], sort_keys=True)


def distance(metrics: Mapping[str, float]) -> str | None:
    """The Frechet distance to show: FID, or the first of another network."""
    names = [name for name in metrics if name == "fid" or name.startswith("fd_")]
    names = [name for name in names if not name.endswith("_floor")]
    return "fid" if "fid" in names else next(iter(names), None)


def table(points: Points, *, metric: str | None = None) -> str:
    """A row a point: what was varied, then `metric` and those that are looked at first."""
    shown = [metric, distance(points[0]["metrics"]), *SHOWN]
    names = [name for name in dict.fromkeys(shown) if name in points[0]["metrics"]]
    lines = [[*points[0]["varied"], *names]]
    for point in points:
        lines.append([*point["varied"].values(), *(f"{point['metrics'][n]:.4g}" for n in names)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
