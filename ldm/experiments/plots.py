"""The figures of many runs: quality curves, metrics over the training, and samples side by side."""

import io
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation
from PIL import Image

from ldm.experiments.curves import CurvePoints, select_distance_metric
from ldm.experiments.run_dir import infer_metric_direction, parse_number
from ldm.utils.plots import (
    GAP,
    GREY,
    LABEL_HEIGHT,
    MARGIN,
    NOTE_HEIGHT,
    Page,
    measure_heading,
    wrap_paragraph,
)

METRIC_TITLES = {"clip_score": "CLIP score", "scene_accuracy": "scene accuracy", "fid": "FID"}
DIRECTION_LABELS = {"minimize": "lower is better", "maximize": "higher is better"}
AXIS_SETTINGS = ("steps", "length")  # settings that are the x axis of a figure where they vary
LINE_OFFSET = 4.0  # points between two lines, so that one's intervals do not hide the other's
LINE_STYLES = ("-", "--", ":", "-.")  # one for every ten colours

MetricCurve = Sequence[tuple[float, float]]  # (images seen, value)


def render_figure(figure: Figure) -> Image.Image:
    """Returns a figure as an image."""
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return Image.open(file).convert("RGB")


def _style(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def plot_quality_curve(runs: Mapping[str, CurvePoints], *, metric: str | None = None) -> Figure:
    """Plots the quality of one or several runs, by name, against a setting or against each other.

    Where steps or EMA lengths vary they are the x axis, and `metric` has the first panel. Otherwise
    the distance is plotted against the CLIP score and the scene accuracy, or a single metric
    against the setting that varies. The other settings name the lines. Bars are 95 % intervals, the
    dotted line is the value of real images, the dashed line that of the run's own average. A metric
    that is 0 at all points is left out if there is another.
    """
    key, measured = _select_axis(runs), next(iter(runs.values()))[0]["metrics"]
    distance = select_distance_metric(measured)
    scores = [name for name in ("clip_score", "scene_accuracy") if name in measured]
    points = [point["metrics"] for run in runs.values() for point in run]
    if distance or metric or len(scores) > 1:
        scores = [name for name in scores if any(each[name] for each in points)]
    if distance and scores and key not in AXIS_SETTINGS:
        panels = [(name, distance) for name in scores]
    else:
        panels = [(None, name) for name in dict.fromkeys([metric, distance, *scores]) if name]
    figure = Figure(figsize=(max(6.4, 5.2 * len(panels)), 4.6), layout="constrained")
    for i, (x, y) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        _plot_panel(axes, _group_lines(runs, key), key, x, y)
        if i == 0 and len(axes.get_legend_handles_labels()[1]) > 1:
            figure.legend(loc="outside lower left", frameon=False, ncols=4)
    return figure


def _select_axis(runs: Mapping[str, CurvePoints]) -> str:
    """Returns the setting of the x axis: steps or length, else the first numeric one."""
    varied = [point["varied"] for points in runs.values() for point in points]
    numeric = [k for k in varied[0] if all(parse_number(each[k]) is not None for each in varied)]
    return next(iter([*(key for key in AXIS_SETTINGS if key in numeric), *numeric, *varied[0]]))


def _group_lines(runs: Mapping[str, CurvePoints], key: str) -> dict[str, list[dict]]:
    """Groups the points of each run that differ in `key` alone; sorted by `key`."""
    lines: dict[str, list[dict]] = {}
    for run, points in runs.items():
        for point in points:
            others = {k: v for k, v in point["varied"].items() if k != key}
            words = [v if parse_number(v) is None else f"{k}={v}" for k, v in others.items()]
            lines.setdefault(" ".join([run, *words]).strip(), []).append(point)
    for points in lines.values():
        points.sort(key=lambda point: parse_number(point["varied"][key]) or 0)
    return lines


def _plot_panel(
    axes: Axes, lines: Mapping[str, CurvePoints], key: str, x: str | None, y: str
) -> None:
    """Plots metric `y` against metric `x`, or against the setting `key` if x is None."""
    axes.set_xlabel(key if x is None else _format_metric_label(x))
    axes.set_ylabel(_format_metric_label(y))
    _style(axes)
    values = dict.fromkeys(point["varied"][key] for points in lines.values() for point in points)
    numeric = all(parse_number(value) is not None for value in values)
    positions = {value: float(value) if numeric else i for i, value in enumerate(values)}
    for i, (label, points) in enumerate(lines.items()):
        colour = f"C{i % 10}"
        across = [p["metrics"][x] if x is not None else positions[p["varied"][key]] for p in points]
        up = [point["metrics"][y] for point in points]
        thin = {"ecolor": colour, "alpha": 0.5, "elinewidth": 1, "capsize": 2.5}
        bars = {"xerr": _bar_lengths(points, x), "yerr": _bar_lengths(points, y)}
        _, *ends = axes.errorbar(across, up, **bars, **thin, fmt="none")
        style = {"color": colour, "linewidth": 1.4, "marker": "o", "markersize": 4}
        artists = axes.plot(across, up, **style, label=label)
        if x is not None:
            for point, at in zip(points, zip(across, up, strict=True), strict=True):
                offset = {"textcoords": "offset points", "xytext": (5, 4)}
                axes.annotate(point["varied"][key], at, fontsize=8, **offset)
            continue
        inches = (i - (len(lines) - 1) / 2) * LINE_OFFSET / 72
        aside = ScaledTranslation(inches, 0, axes.figure.dpi_scale_trans)
        for artist in [*artists, *(part for each in ends for part in each)]:
            # Not before: the limits of the axes ignore an artist with a transform of its own.
            artist.set_transform(axes.transData + aside)
        if (level := points[0].get("own", {}).get(y)) is not None:
            _plot_level(axes, level, f"{label} as trained".strip(), 0.01, color=colour, style="--")
    if x is None:
        if key in AXIS_SETTINGS:
            axes.set_xscale("log")
            axes.minorticks_off()
        ticks = {position: value for value, position in positions.items()}
        tilt = 60 if len(ticks) > 8 else 0
        axes.set_xticks(list(ticks), labels=list(ticks.values()), rotation=tilt)
    every = [point["metrics"] for points in lines.values() for point in points]
    real = {metrics.get(f"{y}_floor", metrics.get(f"{y}_real")) for metrics in every}
    if len(real) == 1 and (level := real.pop()) is not None:
        _plot_level(axes, level, "real images", 1, color="grey", style=":", align="right")


def _plot_level(
    axes: Axes, level: float, label: str, x: float, *, color: str, style: str, align: str = "left"
) -> None:
    axes.axhline(level, color=color, linestyle=style, linewidth=1)
    place = {"ha": align, "va": "bottom", "transform": axes.get_yaxis_transform()}
    axes.text(x, level, label, color=color, fontsize=8, **place)


def _bar_lengths(points: Sequence[dict], name: str | None) -> list[list[float]] | None:
    """Returns how far the intervals of a metric reach below and above; None if one has none."""
    ends = [point.get("intervals", {}).get(name) for point in points]
    if not all(ends):
        return None
    pairs = [(point["metrics"][name], *end) for point, end in zip(points, ends, strict=True)]
    below = [max(value - low, 0.0) for value, low, _ in pairs]
    return [below, [max(high - value, 0.0) for value, _, high in pairs]]


def _format_metric_label(metric: str) -> str:
    title = METRIC_TITLES.get(metric, metric)
    if metric.startswith("fd_"):
        title = f"Frechet distance, {metric.removeprefix('fd_')} features"
    return f"{title} ({DIRECTION_LABELS[infer_metric_direction(metric)]})"


def plot_metric_curves(panels: Mapping[str, Sequence[tuple[str, MetricCurve]]]) -> Image.Image:
    """Plots metrics against images seen: one panel per metric, one line per run."""
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    labels = list(dict.fromkeys(name for lines in panels.values() for name, _ in lines))
    wrapped = {label: textwrap.fill(label, 65 * columns) for label in labels}
    height = 3.8 * rows + 0.24 * sum(text.count("\n") + 1 for text in wrapped.values())
    figure = Figure(figsize=(6.4 * columns, height), layout="constrained")
    handles = {}
    for i, (metric, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.set_title(metric, loc="left", fontsize=11)
        axes.set_xlabel("images seen")
        _style(axes)
        for name, points in lines:
            number = labels.index(name)
            dashes = LINE_STYLES[number // 10 % len(LINE_STYLES)]
            style = {"color": f"C{number % 10}", "linestyle": dashes, "linewidth": 1.4}
            x, y = np.array(points, dtype=float).reshape(-1, 2).T
            handles[name] = axes.plot(x, y, marker=".", label=name, **style)[0]
    lines, texts = [handles[name] for name in labels], [wrapped[name] for name in labels]
    figure.legend(lines, texts, loc="outside lower left", frameon=False)
    return render_figure(figure)


def draw_sample_page(
    title: str,
    subtitle: str,
    prompts: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    *,
    side: int = 160,
) -> Image.Image:
    """Draws a page with a row of images per run and a column per prompt."""
    width = max(len(prompts) * (side + GAP) - GAP, 760) + 2 * MARGIN
    line = round(LABEL_HEIGHT * 1.35)
    heads = [wrap_paragraph(prompt, side, size=NOTE_HEIGHT, max_lines=5) for prompt in prompts]
    labels = [wrap_paragraph(label, (width - 2 * MARGIN) / 1.15, max_lines=2) for label, _ in rows]
    top = measure_heading(subtitle, width)
    y = top + max(map(len, heads)) * round(NOTE_HEIGHT * 1.35) + GAP
    heights = [len(label) * line + 4 + side + 2 * GAP for label in labels]
    page = Page(width, y + sum(heights) + MARGIN)
    page.add_heading(title, subtitle)
    lefts = [MARGIN + i * (side + GAP) for i in range(len(prompts))]
    for x, words in zip(lefts, heads, strict=True):
        page.add_text(x, top, "\n".join(words), size=NOTE_HEIGHT, colour=GREY)
    for (_, images), label, height in zip(rows, labels, heights, strict=True):
        page.add_text(MARGIN, y, "\n".join(label), bold=True)
        for x, image in zip(lefts, images, strict=False):
            is_multiple = side % image.width == 0
            how = Image.Resampling.NEAREST if is_multiple else Image.Resampling.LANCZOS
            page.add_image(x, y + height - side - 2 * GAP, image.resize((side, side), how))
        y += height
    return page.render()
