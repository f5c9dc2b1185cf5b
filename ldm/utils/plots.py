"""Pages of labelled pictures and numbers, laid out in pixels on white.

Shapes: n pictures, m captions, H W pixels. Pages are made for a README's 900 pixels: about 1264
wide, so that the text is still read.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from ldm.utils.images import load_font, to_pil, wrap_text

FIGURE_IMAGE_SIZE = 128  # of a picture on a page
GAP, MARGIN = 8, 24
TITLE_HEIGHT, LABEL_HEIGHT, NOTE_HEIGHT = 28, 20, 16  # heights of text
INK, GREY, ACCENT = "#1a1a1a", "#666666", "#1f5fbf"

_DPI = 100
_LINE = 1.35  # heights of text from one line to the next
_BOLD = 1.15  # bold letters are so much wider


@dataclass(frozen=True)
class ImageRow:
    """Pictures (3, H, W) in [-1, 1] side by side, a line above them, a note beneath each."""

    label: str
    images: Sequence[Tensor]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class ImageChange:
    """Two pictures that differ in one thing, and words with their cosines to the difference."""

    label: str
    before: Tensor
    after: Tensor
    words: Sequence[tuple[str, float]]
    right: str  # the word that says the difference


class Page:
    """A white page with y down; pictures land on whole pixels, as they are."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
        self.canvas = FigureCanvasAgg(self.figure)

    def text(
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
        """Text whose first line begins (or ends, or is centred) at x, with its top at y.

        With `math`, what stands between dollars is set as a formula.
        """
        for i, line in enumerate(text.split("\n")):
            self.figure.text(
                x / self.width,
                1 - (y + (0.9 + i * _LINE) * size) / self.height,
                line,
                fontsize=size * 72 / _DPI,
                color=colour,
                fontweight="bold" if bold else "normal",
                ha=align,
                va="baseline",
                parse_math=math,
            )

    def picture(self, x: int, y: int, image: Image.Image) -> None:
        """A picture with its upper left corner at (x, y)."""
        self.figure.figimage(
            np.asarray(image), xo=x, yo=self.height - y - image.height, origin="upper"
        )

    def box(self, x: float, y: float, width: float, height: float, colour) -> None:
        """A filled rectangle."""
        corner = x / self.width, 1 - (y + height) / self.height
        sides = width / self.width, height / self.height
        place = self.figure.transFigure
        self.figure.add_artist(Rectangle(corner, *sides, transform=place, lw=0, color=colour))

    def heading(self, title: str, description: str) -> int:
        """The title and a paragraph under it; returns where the next thing may begin."""
        self.text(MARGIN, MARGIN, title, size=TITLE_HEIGHT, bold=True, math=True)
        top = MARGIN + round(TITLE_HEIGHT * 1.7)
        lines = wrap_paragraph(description, self.width - 2 * MARGIN)
        self.text(MARGIN, top, "\n".join(lines), colour=GREY)
        return measure_heading(description, self.width)

    def image(self) -> Image.Image:
        """The page as a picture."""
        with warnings.catch_warnings():  # a letter that the font has not becomes a box
            warnings.filterwarnings("ignore", message="Glyph.*missing")
            self.canvas.draw()
        return Image.fromarray(np.asarray(self.canvas.buffer_rgba())[..., :3].copy())


def wrap_paragraph(
    text: str, width: float, *, size: int = LABEL_HEIGHT, max_lines: int = 4
) -> list[str]:
    """`text` in lines of `width` pixels, not more than `most`."""
    return wrap_text(text, width, load_font(size), max_lines=max_lines)


def measure_heading(description: str, width: int) -> int:
    """Pixels that a heading takes on a page of `width`."""
    lines = wrap_paragraph(description, width - 2 * MARGIN)
    return MARGIN + round(TITLE_HEIGHT * 1.7) + round(len(lines) * LABEL_HEIGHT * _LINE) + 2 * GAP


def resize_longer_side(image: Tensor, side: int = FIGURE_IMAGE_SIZE) -> Image.Image:
    """A picture (3, H, W) in [-1, 1] whose longer side has `side` pixels.

    Where that is a whole factor, its pixels are seen as they are.
    """
    picture = to_pil(image)
    longest = max(picture.size)
    size = [max(round(length * side / longest), 1) for length in picture.size]
    whole = side % longest == 0
    return picture.resize(size, Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)


def draw_image_grid(
    title: str, description: str, rows: Sequence[ImageRow], *, heads: Sequence[str] = ()
) -> Image.Image:
    """A page of rows of pictures; `heads` above the columns may have formulas between dollars."""
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
    y = page.heading(title, description)
    lefts = [MARGIN + i * (FIGURE_IMAGE_SIZE + GAP) for i in range(columns)]
    for x, text in zip(lefts, heads, strict=False):
        page.text(x + FIGURE_IMAGE_SIZE / 2, y, text, align="center", math=True)
    y += head
    for row, label, height in zip(rows, labels, heights, strict=True):
        page.text(MARGIN, y, "\n".join(label), bold=True)
        top = y + len(label) * line + 4
        for x, image in zip(lefts, row.images, strict=False):
            page.picture(x, top, resize_longer_side(image))
        for x, text in zip(lefts, row.notes, strict=False):
            page.text(
                x + FIGURE_IMAGE_SIZE / 2,
                top + FIGURE_IMAGE_SIZE + 4,
                text,
                size=NOTE_HEIGHT,
                colour=GREY,
                align="center",
            )
        y += height
    return page.image()


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
    """A page with cosines (m, n) of captions (rows) and pictures (columns), and `changes` below.

    Each row's and column's largest number is bold, darker is larger.
    """
    words_wide, side, cell = 320, 104, 68
    width = 2 * MARGIN + words_wide + len(images) * (side + GAP)
    between = wrap_paragraph(below, width - 2 * MARGIN)
    block = 5 * round(NOTE_HEIGHT * 1.5) + round(LABEL_HEIGHT * 1.7) + 3 * GAP
    top = measure_heading(description, width)
    lower = top + side + GAP + len(captions) * (cell + 2) + 3 * GAP
    blocks = lower + round(len(between) * LABEL_HEIGHT * _LINE) + 2 * GAP
    page = Page(width, blocks + (len(changes) + 1) // 2 * block + MARGIN)
    page.heading(title, description)
    lefts = [MARGIN + words_wide + GAP + i * (side + GAP) for i in range(len(images))]
    for x, image in zip(lefts, images, strict=True):
        page.picture(x, top, resize_longer_side(image, side))
    low, high = cosines.min(), cosines.max()
    for i, (caption, row) in enumerate(zip(captions, cosines, strict=True)):
        y = top + side + GAP + i * (cell + 2)
        said = wrap_paragraph(caption, words_wide - GAP, size=NOTE_HEIGHT, max_lines=3)
        free = cell - len(said) * NOTE_HEIGHT * _LINE
        page.text(MARGIN, y + free / 2, "\n".join(said), size=NOTE_HEIGHT)
        for j, (x, value) in enumerate(zip(lefts, row, strict=True)):
            share = (value - low) / max(high - low, 1e-9)
            page.box(x, y, side, cell, _blue(share))
            best = value >= max(row.max(), cosines[:, j].max())
            page.text(
                x + side / 2,
                y + (cell - LABEL_HEIGHT) / 2,
                f"{value:.2f}",
                colour="white" if share > 0.55 else INK,
                bold=best,
                align="center",
            )
    page.text(MARGIN, lower, "\n".join(between), colour=GREY)
    for i, change in enumerate(changes):
        x = MARGIN + i % 2 * (width // 2 - MARGIN // 2)
        _draw_change(page, x, blocks + i // 2 * block, change, width // 2 - 2 * MARGIN)
    return page.image()


def _draw_change(page: Page, x: int, y: int, change: ImageChange, width: int) -> None:
    """The two pictures, and a bar a word."""
    page.text(x, y, change.label, bold=True)
    y += round(LABEL_HEIGHT * 1.7)
    for offset, image in ((0, change.before), (FIGURE_IMAGE_SIZE + 3 * GAP, change.after)):
        page.picture(x + offset, y, resize_longer_side(image))
    page.text(
        x + FIGURE_IMAGE_SIZE + 1.5 * GAP, y + FIGURE_IMAGE_SIZE / 2 - 12, "›", align="center"
    )
    left = x + 2 * FIGURE_IMAGE_SIZE + 5 * GAP
    bars, room = left + 100, width - (2 * FIGURE_IMAGE_SIZE + 5 * GAP) - 160
    for i, (word, cosine) in enumerate(change.words):
        top = y + i * round(NOTE_HEIGHT * 1.5)
        right = word == change.right
        colour = ACCENT if right else GREY
        page.text(left, top, word, size=NOTE_HEIGHT, bold=right, colour=colour)
        page.box(bars, top + 1, max(cosine, 0) * room, NOTE_HEIGHT, colour if right else "#cccccc")
        at = bars + max(cosine, 0) * room + GAP
        page.text(at, top, f"{cosine:.2f}", size=NOTE_HEIGHT, colour=colour)


def _blue(share: float) -> tuple[float, ...]:
    """From nearly white (0) to a dark blue (1)."""
    low, high = np.array([0.95, 0.97, 1.0]), np.array([0.05, 0.25, 0.55])
    return tuple(low + share * (high - low))
