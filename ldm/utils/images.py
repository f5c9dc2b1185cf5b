"""Image tensors (3, H, W) to Pillow images, grids with captions, and PNG files with metadata."""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ldm.utils.files import read_regular_file, replace_file

if TYPE_CHECKING:  # a command that only reads PNG files need not wait for torch
    from torch import Tensor

MAX_PNG_BYTES = 2**28


def to_uint8_tensor(images: Tensor) -> Tensor:
    """Converts images (n, 3, H, W) in [-1, 1] to uint8, rounded, on their device."""
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte()


def to_uint8(images: Tensor) -> np.ndarray:
    """Converts images (n, 3, H, W) in [-1, 1] to uint8 (n, H, W, 3) on the host."""
    return to_uint8_tensor(images).permute(0, 2, 3, 1).cpu().numpy()


def from_uint8(image: np.ndarray) -> Tensor:
    """Converts uint8 (H, W, 3) to an image (3, H, W) in [-1, 1]."""
    import torch

    return torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1


def to_pil(image: Tensor) -> Image.Image:
    """Converts one image (3, H, W) in [-1, 1]."""
    return Image.fromarray(to_uint8(image[None])[0])


def make_image_grid(
    images: Sequence[Tensor] | Tensor, *, columns: int | None = None, gap: int = 2
) -> Image.Image:
    """Arranges n images (3, H, W) in [-1, 1] in a grid that is as square as possible.

    Images of several sizes are in the middle of cells of the largest height and width.
    """
    return _arrange([to_pil(image) for image in images], columns, gap)


def split_image_grid(
    grid: Image.Image, n: int, *, columns: int | None = None, gap: int = 2
) -> list[Image.Image]:
    """Returns the n images of a `make_image_grid`."""
    columns = columns or _choose_columns(n)
    width = (grid.width + gap) // columns - gap
    height = (grid.height + gap) // math.ceil(n / columns) - gap
    corners = [(i % columns * (width + gap), i // columns * (height + gap)) for i in range(n)]
    return [grid.crop((x, y, x + width, y + height)) for x, y in corners]


def make_captioned_grid(
    images: Sequence[Tensor] | Tensor, captions: Sequence[str], *, columns: int | None = None
) -> Image.Image:
    """Arranges images like `make_image_grid`, with captions of up to four lines below them.

    Images below 192 pixels are enlarged by a whole factor (bicubic).
    """
    factor = math.ceil(192 / images[0].shape[-1])
    width, height = (side * factor for side in to_pil(images[0]).size)
    font, line_height = load_font(15), 20
    texts = [wrap_text(caption, width, font, max_lines=4) for caption in captions]
    card_height = height + max(map(len, texts)) * line_height + 6
    cards = []
    for image, lines in zip(map(to_pil, images), texts, strict=True):
        card = Image.new("RGB", (width, card_height), color="white")
        card.paste(image.resize((width, height), Image.Resampling.BICUBIC))
        for i, text in enumerate(lines):
            place = (0, height + 4 + i * line_height)
            ImageDraw.Draw(card).text(place, text, fill="black", font=font)
        cards.append(card)
    return _arrange(cards, columns, gap=12)


def _arrange(images: Sequence[Image.Image], columns: int | None, gap: int) -> Image.Image:
    n = len(images)
    width, height = (max(image.size[side] for image in images) for side in (0, 1))
    columns = columns or _choose_columns(n)
    rows = math.ceil(n / columns)
    size = (columns * (width + gap) - gap, rows * (height + gap) - gap)
    grid = Image.new("RGB", size, color="white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        left, top = (width - image.width) // 2, (height - image.height) // 2
        grid.paste(image, (column * (width + gap) + left, row * (height + gap) + top))
    return grid


@cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Returns DejaVu Sans, `size` pixels: it has Latin, Greek and Cyrillic, Pillow's only ASCII."""
    import matplotlib  # slow to import

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)


def wrap_text(
    text: str, width: float, font: ImageFont.FreeTypeFont, *, max_lines: int
) -> list[str]:
    """Returns a text in lines of `width` pixels; splits long words, ends a long text in "..."."""
    lines, line = [], ""
    # Half an emoji has no UTF-8, and 2000 characters fill any four lines.
    words = text.encode("utf-8", "replace").decode("utf-8")[:2000].split()
    for word in words:
        for piece in _split_word(word, width, font):
            longer = f"{line} {piece}".strip()
            if not line or font.getlength(longer) <= width:
                line = longer
            else:
                lines, line = [*lines, line], piece
    lines.append(line)
    if len(lines) > max_lines:
        *words, last = lines[max_lines - 1].split()
        while words and font.getlength(" ".join([*words, last, "..."])) > width:
            last = words.pop()
        lines = [*lines[: max_lines - 1], " ".join([*words, last, "..."])]
    return lines


def _split_word(word: str, width: float, font: ImageFont.FreeTypeFont) -> list[str]:
    pieces = [""]
    for letter in word:
        if pieces[-1] and font.getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def save_png(image: Image.Image, path: Path, facts: dict) -> None:
    """Saves a PNG with one text entry for each of the `facts`; other values are stored as JSON."""
    info = PngInfo()
    for key, value in facts.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        info.add_itxt(key, text.encode("utf-8", "replace"))  # half an emoji becomes "?"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as file:
        image.save(file, format="PNG", pnginfo=info)


def load_png(path: Path) -> tuple[Image.Image, dict]:
    """Returns the image and the facts of an untrusted PNG; ValueError if it is damaged."""
    try:
        data = io.BytesIO(read_regular_file(path, max_bytes=MAX_PNG_BYTES))
        with warnings.catch_warnings(), Image.open(data, formats=["PNG"]) as image:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            facts = {key: _parse_fact(text) for key, text in image.text.items()}
            return image.convert("RGB"), facts
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise ValueError(f"{path} is no PNG that can be read ({error})") from error


def _parse_fact(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _choose_columns(n: int) -> int:
    """Returns the columns of a square, or one more if that leaves fewer gaps."""
    square = math.ceil(math.sqrt(n))
    return min(square, square + 1, key=lambda columns: -n % columns)
