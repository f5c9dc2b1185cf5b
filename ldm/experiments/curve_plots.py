"""The picture of a curve: distance against CLIP score, or both against the number of steps."""

import io
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation
from PIL import Image

from ldm.experiments.curves import CurvePoints, select_distance_metric
from ldm.experiments.run_dir import infer_metric_direction, parse_number

METRIC_TITLES = {"clip_score": "CLIP score", "scene_accuracy": "scene accuracy", "fid": "FID"}
AXIS_SETTINGS = (
    "steps",
    "length",
)  # settings that have a direction of their own, from little to much
LINE_OFFSET = 4.0  # points between two lines, so that one's intervals do not hide the other's
DIRECTION_LABELS = {"minimize": "lower is better", "maximize": "higher is better"}


def render_quality_curve(
    runs: Mapping[str, CurvePoints], *, metric: str | None = None
) -> Image.Image:
    """`figure` as a picture."""
    file = io.BytesIO()
    FigureCanvasAgg(plot_quality_curve(runs, metric=metric)).print_png(file)
    return Image.open(file).convert("RGB")


def plot_quality_curve(runs: Mapping[str, CurvePoints], *, metric: str | None = None) -> Figure:
    """Points of one or several runs, by name.

    Where steps or EMA lengths were varied they are the axis, and `metric` comes first. Else
    distance is drawn against CLIP score and against scene accuracy, with the points labelled, or
    each of them alone against what was varied. All other settings name lines, which stand a little
    beside one another. Bars are 95 % intervals, a dotted line is what real pictures get, a dashed
    one what a run's own average gets. What is 0 at all points is left out beside others.
    """
    first = next(iter(runs.values()))[0]
    key, measured = _axis(runs), first["metrics"]
    far = select_distance_metric(measured)
    good = [name for name in ("clip_score", "scene_accuracy") if name in measured]
    every = [point["metrics"] for points in runs.values() for point in points]
    if far or metric or good[1:]:  # a flat line, as of a model that paints no scenes, says nothing
        good = [name for name in good if any(one[name] for one in every)]
    if far and good and key not in AXIS_SETTINGS:
        panels = [(name, far) for name in good]
    else:
        panels = [(None, name) for name in dict.fromkeys([metric, far, *good]) if name]
    drawn = Figure(figsize=(max(6.4, 5.2 * len(panels)), 4.6), layout="constrained")
    for i, (x, y) in enumerate(panels):
        axes = drawn.add_subplot(1, len(panels), i + 1)
        _panel(axes, _lines(runs, key), key, x, y)
        if i == 0 and len(axes.get_legend_handles_labels()[1]) > 1:
            drawn.legend(loc="outside lower left", frameon=False, ncols=4)
    return drawn


def _panel(axes: Axes, lines: Mapping[str, CurvePoints], key: str, x: str | None, y: str) -> None:
    """Metric `y` against metric `x`; where that is None, against the setting `key`."""
    axes.set_xlabel(key if x is None else _format_metric_label(x))
    axes.set_ylabel(_format_metric_label(y))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    places = [point["varied"][key] for points in lines.values() for point in points]
    numeric = all(parse_number(place) is not None for place in places)
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
        thin = {"ecolor": colour, "alpha": 0.5, "elinewidth": 1, "capsize": 2.5}
        _, *ends = axes.errorbar(across, up, **bars, **thin, fmt="none")
        line = {"color": colour, "linewidth": 1.4, "marker": "o", "markersize": 4}
        drawn = [
            *axes.plot(across, up, **line, label=label),
            *(part for one in ends for part in one),
        ]
        if x is None:
            inches = (i - (len(lines) - 1) / 2) * LINE_OFFSET / 72
            aside = ScaledTranslation(inches, 0, axes.figure.dpi_scale_trans)
            for part in drawn:  # only now: what has limits of its own is left out of the axes'
                part.set_transform(axes.transData + aside)
        level = points[0].get("own", {}).get(y)
        if x is None and level is not None:
            axes.axhline(level, color=colour, linestyle="--", linewidth=1)
            axes.text(0.01, level, f"{label} as trained".strip(), color=colour, fontsize=8,
                      va="bottom", transform=axes.get_yaxis_transform())  # fmt: skip
        if x is not None:
            for at, height, point in zip(across, up, points, strict=True):
                axes.annotate(point["varied"][key], (at, height), fontsize=8,
                              textcoords="offset points", xytext=(5, 4))  # fmt: skip
    if x is None and key in AXIS_SETTINGS:
        axes.set_xscale("log")
        axes.minorticks_off()
    if x is None:
        ticks = {float(place) if numeric else order[place]: place for place in places}
        tilt = 60 if len(ticks) > 8 else 0  # of several runs, with lengths of their own
        axes.set_xticks(list(ticks), labels=list(ticks.values()), rotation=tilt)
    real = {_real(point["metrics"], y) for points in lines.values() for point in points}
    if len(real) == 1 and (level := real.pop()) is not None:
        axes.axhline(level, color="grey", linestyle=":", linewidth=1)
        axes.text(1, level, "real pictures", color="grey", fontsize=8, ha="right", va="bottom",
                  transform=axes.get_yaxis_transform())  # fmt: skip


def _axis(runs: Mapping[str, CurvePoints]) -> str:
    """The setting that points of one line differ in: steps, or the first that is a number."""
    varied = [point["varied"] for points in runs.values() for point in points]
    numeric = [
        key for key in varied[0] if all(parse_number(one[key]) is not None for one in varied)
    ]
    return next(iter([*(key for key in AXIS_SETTINGS if key in numeric), *numeric, *varied[0]]))


def _lines(runs: Mapping[str, CurvePoints], key: str) -> dict[str, list[dict]]:
    """The points of each run that differ in `key` alone, in its order, by what they share."""
    lines: dict[str, list[dict]] = {}
    for run, points in runs.items():
        for point in points:
            others = {k: v for k, v in point["varied"].items() if k != key}
            words = [v if parse_number(v) is None else f"{k}={v}" for k, v in others.items()]
            lines.setdefault(" ".join([run, *words]).strip(), []).append(point)
    return {
        label: sorted(points, key=lambda point: parse_number(point["varied"][key]) or 0)
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


def _format_metric_label(metric: str) -> str:
    shown = METRIC_TITLES.get(metric, metric)
    if metric.startswith("fd_"):
        shown = f"Frechet distance, {metric.removeprefix('fd_')} features"
    return f"{shown} ({DIRECTION_LABELS[infer_metric_direction(metric)]})"
