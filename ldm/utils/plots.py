"""Pages of labelled images and numbers, laid out in pixels on white.

Shapes: n images, m captions, H W pixels. A page is about 1264 pixels wide: its text is readable at
the 900 pixels of a README.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from ldm.utils.images import load_font, to_pil, wrap_text

if TYPE_CHECKING:
    from torch import Tensor

FIGURE_IMAGE_SIZE = 128  # pixels of an image's longer side
GAP, MARGIN = 8, 24
TITLE_HEIGHT, LABEL_HEIGHT, NOTE_HEIGHT = 28, 20, 16  # pixels of a line of text
INK, GREY, ACCENT = "#1a1a1a", "#666666", "#1f5fbf"

_DPI = 100
_LINE = 1.35  # line spacing
_BOLD = 1.15  # width of bold letters


@dataclass(frozen=True)
class ImageRow:
    """Images (3, H, W) in [-1, 1] side by side, with a label above and a note below each."""

    label: str
    images: Sequence[Tensor]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class ImageChange:
    """Two images that differ in one thing, and words with their cosines to the difference."""

    label: str
    before: Tensor
    after: Tensor
    words: Sequence[tuple[str, float]]
    right: str  # the word of the difference


class Page:
    """A white page; x and y are pixels from the upper left corner."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
        self.canvas = FigureCanvasAgg(self.figure)

    def add_text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = LABEL_HEIGHT,
        colour: str = INK,
        bold: bool = False,
        align: str = "left",
        math: bool = False,
    ) -> None:
        """Adds text with its top at y, x as `align` says; math: dollars enclose formulas."""
        style = {"fontsize": size * 72 / _DPI, "color": colour, "ha": align, "va": "baseline"}
        style |= {"fontweight": "bold" if bold else "normal", "parse_math": math}
        for i, line in enumerate(text.split("\n")):
            baseline = y + (0.9 + i * _LINE) * size
            self.figure.text(x / self.width, 1 - baseline / self.height, line, **style)

    def add_image(self, x: int, y: int, image: Image.Image) -> None:
        """Adds an image, pixel by pixel, with its upper left corner at (x, y)."""
        pixels, bottom = np.asarray(image), self.height - y - image.height
        self.figure.figimage(pixels, xo=x, yo=bottom, origin="upper")

    def add_box(
        self, x: float, y: float, width: float, height: float, colour: str | tuple[float, ...]
    ) -> None:
        """Adds a filled rectangle."""
        corner = x / self.width, 1 - (y + height) / self.height
        sides = width / self.width, height / self.height
        place = self.figure.transFigure
        self.figure.add_artist(Rectangle(corner, *sides, transform=place, lw=0, color=colour))

    def add_heading(self, title: str, description: str) -> int:
        """Adds the title and a paragraph below it; returns the y where the next part may begin."""
        self.add_text(MARGIN, MARGIN, title, size=TITLE_HEIGHT, bold=True, math=True)
        lines = wrap_paragraph(description, self.width - 2 * MARGIN)
        top = MARGIN + round(TITLE_HEIGHT * 1.7)
        self.add_text(MARGIN, top, "\n".join(lines), colour=GREY)
        return measure_heading(description, self.width)

    def render(self) -> Image.Image:
        """Returns the page as an image."""
        with warnings.catch_warnings():  # a letter that the font lacks becomes a box
            warnings.filterwarnings("ignore", message="Glyph.*missing")
            self.canvas.draw()
        return Image.fromarray(np.asarray(self.canvas.buffer_rgba())[..., :3].copy())


def wrap_paragraph(
    text: str, width: float, *, size: int = LABEL_HEIGHT, max_lines: int = 4
) -> list[str]:
    """Returns `text` in at most `max_lines` lines of `width` pixels."""
    return wrap_text(text, width, load_font(size), max_lines=max_lines)


def measure_heading(description: str, width: int) -> int:
    """Returns the height of a heading on a page of `width`, in pixels."""
    lines = wrap_paragraph(description, width - 2 * MARGIN)
    return MARGIN + round(TITLE_HEIGHT * 1.7) + round(len(lines) * LABEL_HEIGHT * _LINE) + 2 * GAP


def resize_longer_side(image: Tensor, side: int = FIGURE_IMAGE_SIZE) -> Image.Image:
    """Returns an image (3, H, W) in [-1, 1] with `side` pixels on its longer side."""
    small = to_pil(image)
    longest = max(small.size)
    size = [max(round(length * side / longest), 1) for length in small.size]
    is_multiple = side % longest == 0
    return small.resize(size, Image.Resampling.NEAREST if is_multiple else Image.Resampling.LANCZOS)


def draw_image_grid(
    title: str, description: str, rows: Sequence[ImageRow], *, heads: Sequence[str] = ()
) -> Image.Image:
    """Draws rows of images; the `heads` of the columns may have formulas between dollars."""
    columns = max(len(row.images) for row in rows)
    width = max(columns * (FIGURE_IMAGE_SIZE + GAP) - GAP, 760) + 2 * MARGIN
    line, note = round(LABEL_HEIGHT * _LINE), round(NOTE_HEIGHT * 1.5)
    labels = [wrap_paragraph(row.label, (width - 2 * MARGIN) / _BOLD, max_lines=2) for row in rows]
    heights = [
        len(label) * line + FIGURE_IMAGE_SIZE + (note if row.notes else 0) + 3 * GAP
        for label, row in zip(labels, rows, strict=True)
    ]
    head = line + GAP if heads else 0
    page = Page(width, measure_heading(description, width) + head + sum(heights) + GAP)
    y = page.add_heading(title, description)
    lefts = [MARGIN + i * (FIGURE_IMAGE_SIZE + GAP) for i in range(columns)]
    for x, text in zip(lefts, heads, strict=False):
        page.add_text(x + FIGURE_IMAGE_SIZE / 2, y, text, align="center", math=True)
    y += head
    for row, label, height in zip(rows, labels, heights, strict=True):
        page.add_text(MARGIN, y, "\n".join(label), bold=True)
        top = y + len(label) * line + 4
        for x, image in zip(lefts, row.images, strict=False):
            page.add_image(x, top, resize_longer_side(image))
        for x, text in zip(lefts, row.notes, strict=False):
            middle, below = x + FIGURE_IMAGE_SIZE / 2, top + FIGURE_IMAGE_SIZE + 4
            page.add_text(middle, below, text, size=NOTE_HEIGHT, colour=GREY, align="center")
        y += height
    return page.render()


def draw_similarity_matrix(
    title: str,
    description: str,
    images: Sequence[Tensor],
    captions: Sequence[str],
    cosines: np.ndarray,
    *,
    below: str,
    changes: Sequence[ImageChange],
) -> Image.Image:
    """Draws the cosines (m, n) of captions (rows) and images (columns), and `changes` below.

    Darker is larger; a number is bold if it is the largest of its row and column.
    """
    words_wide, side, cell = 320, 104, 68
    width = 2 * MARGIN + words_wide + len(images) * (side + GAP)
    between = wrap_paragraph(below, width - 2 * MARGIN)
    block = 5 * round(NOTE_HEIGHT * 1.5) + round(LABEL_HEIGHT * 1.7) + 3 * GAP
    top = measure_heading(description, width)
    lower = top + side + GAP + len(captions) * (cell + 2) + 3 * GAP
    blocks = lower + round(len(between) * LABEL_HEIGHT * _LINE) + 2 * GAP
    page = Page(width, blocks + (len(changes) + 1) // 2 * block + MARGIN)
    page.add_heading(title, description)
    lefts = [MARGIN + words_wide + GAP + i * (side + GAP) for i in range(len(images))]
    for x, image in zip(lefts, images, strict=True):
        page.add_image(x, top, resize_longer_side(image, side))
    low, high = cosines.min(), cosines.max()
    for i, (caption, row) in enumerate(zip(captions, cosines, strict=True)):
        y = top + side + GAP + i * (cell + 2)
        lines = wrap_paragraph(caption, words_wide - GAP, size=NOTE_HEIGHT, max_lines=3)
        free = cell - len(lines) * NOTE_HEIGHT * _LINE
        page.add_text(MARGIN, y + free / 2, "\n".join(lines), size=NOTE_HEIGHT)
        for j, (x, value) in enumerate(zip(lefts, row, strict=True)):
            share = (value - low) / max(high - low, 1e-9)
            page.add_box(x, y, side, cell, _blue(share))
            is_best = value >= max(row.max(), cosines[:, j].max())
            colour, middle = "white" if share > 0.55 else INK, y + (cell - LABEL_HEIGHT) / 2
            page.add_text(
                x + side / 2, middle, f"{value:.2f}", colour=colour, bold=is_best, align="center"
            )
    page.add_text(MARGIN, lower, "\n".join(between), colour=GREY)
    for i, change in enumerate(changes):
        x = MARGIN + i % 2 * (width // 2 - MARGIN // 2)
        _draw_change(page, x, blocks + i // 2 * block, change, width // 2 - 2 * MARGIN)
    return page.render()


def _draw_change(page: Page, x: int, y: int, change: ImageChange, width: int) -> None:
    """Draws the two images, and a bar per word."""
    page.add_text(x, y, change.label, bold=True)
    y += round(LABEL_HEIGHT * 1.7)
    for offset, image in ((0, change.before), (FIGURE_IMAGE_SIZE + 3 * GAP, change.after)):
        page.add_image(x + offset, y, resize_longer_side(image))
    between, middle = x + FIGURE_IMAGE_SIZE + 1.5 * GAP, y + FIGURE_IMAGE_SIZE / 2 - 12
    page.add_text(between, middle, "›", align="center")
    left = x + 2 * FIGURE_IMAGE_SIZE + 5 * GAP
    bars, room = left + 100, width - (2 * FIGURE_IMAGE_SIZE + 5 * GAP) - 160
    for i, (word, cosine) in enumerate(change.words):
        top = y + i * round(NOTE_HEIGHT * 1.5)
        is_right, length = word == change.right, max(cosine, 0) * room
        colour, bar = (ACCENT, ACCENT) if is_right else (GREY, "#cccccc")
        page.add_text(left, top, word, size=NOTE_HEIGHT, bold=is_right, colour=colour)
        page.add_box(bars, top + 1, length, NOTE_HEIGHT, bar)
        number = f"{cosine:.2f}"
        page.add_text(bars + length + GAP, top, number, size=NOTE_HEIGHT, colour=colour)


def _blue(share: float) -> tuple[float, ...]:
    """Returns a colour between nearly white (0) and dark blue (1)."""
    low, high = np.array([0.95, 0.97, 1.0]), np.array([0.05, 0.25, 0.55])
    return tuple(low + share * (high - low))
