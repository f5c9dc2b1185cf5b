"""Pictures of several runs side by side: their curves, and what they paint for the same prompts."""

import io
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from ldm.utils.plots import (
    GAP,
    GREY,
    LABEL_HEIGHT,
    MARGIN,
    NOTE_HEIGHT,
    TITLE_HEIGHT,
    Page,
    wrap_paragraph,
)

MetricCurve = Sequence[tuple[float, float]]  # (images seen, value)

_LINE_STYLES = ("-", "--", ":", "-.")  # after ten colours, the next way to draw


def plot_metric_curves(panels: Mapping[str, Sequence[tuple[str, MetricCurve]]]) -> Image.Image:
    """A panel a metric against images seen, a line a run; runs in the order of the legend."""
    count = len(panels)
    columns = min(count, 2)
    rows = -(-count // columns)
    labels = list(dict.fromkeys(name for lines in panels.values() for name, _ in lines))
    wrapped = {label: textwrap.fill(label, 65 * columns) for label in labels}
    height = 3.8 * rows + 0.24 * sum(text.count("\n") + 1 for text in wrapped.values())
    figure = Figure(figsize=(6.4 * columns, height), layout="constrained")
    drawn = {}
    for i, (metric, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.set_title(metric, loc="left", fontsize=11)
        axes.set_xlabel("images seen")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        for name, points in lines:
            at = labels.index(name)
            style = {
                "color": f"C{at % 10}",
                "linestyle": _LINE_STYLES[at // 10 % len(_LINE_STYLES)],
            }
            x, y = np.array(points, dtype=float).reshape(-1, 2).T
            drawn[name] = axes.plot(x, y, marker=".", linewidth=1.4, label=name, **style)[0]
    shown = [label for label in labels if label in drawn]
    lines = [drawn[label] for label in shown]
    figure.legend(lines, [wrapped[n] for n in shown], loc="outside lower left", frameon=False)
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return Image.open(file).convert("RGB")


def draw_sample_page(
    title: str,
    subtitle: str,
    prompts: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    *,
    side: int = 160,
) -> Image.Image:
    """A page with a row of pictures a run, the same prompt in each column."""
    width = max(len(prompts) * (side + GAP) - GAP, 760) + 2 * MARGIN
    line = round(NOTE_HEIGHT * 1.35)
    heads = [wrap_paragraph(prompt, side, size=NOTE_HEIGHT, max_lines=5) for prompt in prompts]
    labels = [wrap_paragraph(label, (width - 2 * MARGIN) / 1.15, max_lines=2) for label, _ in rows]
    below = wrap_paragraph(subtitle, width - 2 * MARGIN)
    top = MARGIN + round(TITLE_HEIGHT * 1.7) + len(below) * round(LABEL_HEIGHT * 1.35) + 2 * GAP
    head = max(map(len, heads)) * line + GAP
    heights = [len(label) * round(LABEL_HEIGHT * 1.35) + 4 + side + 2 * GAP for label in labels]
    page = Page(width, top + head + sum(heights) + MARGIN)
    page.heading(title, subtitle)
    lefts = [MARGIN + i * (side + GAP) for i in range(len(prompts))]
    for x, words in zip(lefts, heads, strict=True):
        page.text(x, top, "\n".join(words), size=NOTE_HEIGHT, colour=GREY)
    y = top + head
    for (_, pictures), label, height in zip(rows, labels, heights, strict=True):
        page.text(MARGIN, y, "\n".join(label), bold=True)
        for x, picture in zip(lefts, pictures, strict=False):
            whole = side % picture.width == 0
            how = Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS
            page.picture(x, y + height - side - 2 * GAP, picture.resize((side, side), how))
        y += height
    return page.image()
