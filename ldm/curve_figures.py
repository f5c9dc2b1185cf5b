"""The picture of a curve: distance against CLIP score, or both against the number of steps."""

import io
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from ldm.curves import Points, distance
from ldm.runs import direction, number

NAMES = {"clip_score": "CLIP score", "scene_accuracy": "scene accuracy", "fid": "FID"}
BETTER = {"minimize": "lower is better", "maximize": "higher is better"}


def curve(runs: Mapping[str, Points]) -> Image.Image:
    """`figure` as a picture."""
    file = io.BytesIO()
    FigureCanvasAgg(figure(runs)).print_png(file)
    return Image.open(file).convert("RGB")


def figure(runs: Mapping[str, Points]) -> Figure:
    """Points of one or several runs, by name.

    Where steps were varied they are the axis. Else distance is drawn against CLIP score and against
    scene accuracy, with the points labelled, or each of them alone against what was varied. All
    other settings name lines. Bars are 95 % intervals, a dotted line is what real pictures get.
    """
    first = next(iter(runs.values()))[0]
    key, measured = _axis(runs), first["metrics"]
    far = distance(measured)
    good = [name for name in ("clip_score", "scene_accuracy") if name in measured]
    if far and good and key != "steps":
        panels = [(name, far) for name in good]
    else:
        panels = [(None, name) for name in (far, *good) if name]
    drawn = Figure(figsize=(max(6.4, 5.2 * len(panels)), 4.6), layout="constrained")
    for i, (x, y) in enumerate(panels):
        axes = drawn.add_subplot(1, len(panels), i + 1)
        _panel(axes, _lines(runs, key), key, x, y)
        if i == 0 and len(axes.get_legend_handles_labels()[1]) > 1:
            drawn.legend(loc="outside lower left", frameon=False, ncols=4)
    return drawn


def _panel(axes: Axes, lines: Mapping[str, Points], key: str, x: str | None, y: str) -> None:
    """Metric `y` against metric `x`; where that is None, against the setting `key`."""
    axes.set_xlabel(key if x is None else _name(x))
    axes.set_ylabel(_name(y))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    places = [point["varied"][key] for points in lines.values() for point in points]
    numeric = all(number(place) is not None for place in places)
    order = {place: i for i, place in enumerate(dict.fromkeys(places))}
    for i, (label, points) in enumerate(lines.items()):
        if x is not None:
            across = [point["metrics"][x] for point in points]
        else:
            own = [point["varied"][key] for point in points]
            across = [float(place) if numeric else order[place] for place in own]
        up = [point["metrics"][y] for point in points]
        bars = {"xerr": _bars(points, x), "yerr": _bars(points, y)}
        colour = f"C{i % 10}"
        axes.errorbar(across, up, **bars, fmt="none", ecolor=colour, alpha=0.3, elinewidth=1)
        axes.plot(across, up, marker="o", markersize=4, linewidth=1.4, color=colour, label=label)
        if x is not None:
            for at, height, point in zip(across, up, points, strict=True):
                axes.annotate(point["varied"][key], (at, height), fontsize=8,
                              textcoords="offset points", xytext=(5, 4))  # fmt: skip
    if x is None and key == "steps":
        axes.set_xscale("log")
        axes.minorticks_off()
    if x is None:
        ticks = {float(place) if numeric else order[place]: place for place in places}
        axes.set_xticks(list(ticks), labels=list(ticks.values()))
    real = {_real(point["metrics"], y) for points in lines.values() for point in points}
    if len(real) == 1 and (level := real.pop()) is not None:
        axes.axhline(level, color="grey", linestyle=":", linewidth=1)
        axes.text(1, level, "real pictures", color="grey", fontsize=8, ha="right", va="bottom",
                  transform=axes.get_yaxis_transform())  # fmt: skip


def _axis(runs: Mapping[str, Points]) -> str:
    """The setting that points of one line differ in: steps, or the first that is a number."""
    varied = [point["varied"] for points in runs.values() for point in points]
    numeric = [key for key in varied[0] if all(number(one[key]) is not None for one in varied)]
    return "steps" if "steps" in numeric else next(iter([*numeric, *varied[0]]))


def _lines(runs: Mapping[str, Points], key: str) -> dict[str, list[dict]]:
    """The points of each run that differ in `key` alone, in its order, by what they share."""
    lines: dict[str, list[dict]] = {}
    for run, points in runs.items():
        for point in points:
            others = {k: v for k, v in point["varied"].items() if k != key}
            words = [v if number(v) is None else f"{k}={v}" for k, v in others.items()]
            lines.setdefault(" ".join([run, *words]).strip(), []).append(point)
    return {
        label: sorted(points, key=lambda point: number(point["varied"][key]) or 0)
        for label, points in lines.items()
    }


def _bars(points: Sequence[dict], name: str | None) -> list[list[float]] | None:
    """How far the intervals of a metric reach below and above its values, where all have one."""
    ends = [point.get("intervals", {}).get(name) for point in points]
    if not all(ends):
        return None
    values = [point["metrics"][name] for point in points]
    pairs = list(zip(values, ends, strict=True))
    low = [max(value - interval[0], 0.0) for value, interval in pairs]
    return [low, [max(interval[1] - value, 0.0) for value, interval in pairs]]


def _real(metrics: Mapping[str, float], name: str) -> float | None:
    return metrics.get(f"{name}_floor", metrics.get(f"{name}_real"))


def _name(metric: str) -> str:
    shown = NAMES.get(metric, metric)
    if metric.startswith("fd_"):
        shown = f"Frechet distance, {metric.removeprefix('fd_')} features"
    return f"{shown} ({BETTER[direction(metric)]})"
