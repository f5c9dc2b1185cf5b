"""Pictures out of tensors, and onto the disk with what made them.

Shapes: n images, H W pixels.
"""

import io
import json
import math
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm.utils.files import read_regular_file, replace_file

MAX_PNG_BYTES = 2**28  # bytes of a picture that is read


def to_uint8_tensor(images: Tensor) -> Tensor:
    """Images (n, 3, H, W) in [-1, 1] to uint8, rounded, on their device."""
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte()


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (n, 3, H, W) in [-1, 1] to bytes (n, H, W, 3) on the host, rounded."""
    return to_uint8_tensor(images).permute(0, 2, 3, 1).cpu().numpy()


def from_uint8(image: np.ndarray) -> Tensor:
    """One picture's bytes (H, W, 3) as an image (3, H, W) in [-1, 1]."""
    return torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1


def to_pil(image: Tensor) -> Image.Image:
    """One image (3, H, W) in [-1, 1] as a picture."""
    return Image.fromarray(to_uint8(image[None])[0])


def make_image_grid(
    images: Sequence[Tensor] | Tensor, *, columns: int | None = None, gap: int = 2
) -> Image.Image:
    """One picture of n images (3, H, W) in [-1, 1], as square an arrangement as goes."""
    return _arrange([to_pil(image) for image in images], columns, gap)


def split_image_grid(
    grid: Image.Image, n: int, *, columns: int | None = None, gap: int = 2
) -> list[Image.Image]:
    """The n pictures that `tile` has put together."""
    columns = columns or _columns(n)
    width = (grid.width + gap) // columns - gap
    height = (grid.height + gap) // math.ceil(n / columns) - gap
    corners = [(i % columns * (width + gap), i // columns * (height + gap)) for i in range(n)]
    return [grid.crop((x, y, x + width, y + height)) for x, y in corners]


def make_captioned_grid(
    images: Sequence[Tensor] | Tensor, captions: Sequence[str], *, columns: int | None = None
) -> Image.Image:
    """As `tile`, with a caption beneath each image, in four lines at most.

    Images below 192 pixels are enlarged by a whole factor (bicubic), so that they can be looked at.
    """
    factor = math.ceil(192 / images[0].shape[-1])
    pictures = [to_pil(image) for image in images]
    width, height = (side * factor for side in pictures[0].size)
    letters, line = load_font(15), 20
    texts = [wrap_text(caption, width, letters, max_lines=4) for caption in captions]
    cards = []
    for picture, lines in zip(pictures, texts, strict=True):
        tall = height + max(map(len, texts)) * line + 6
        card = Image.new("RGB", (width, tall), color="white")
        card.paste(picture.resize((width, height), Image.Resampling.BICUBIC))
        for i, text in enumerate(lines):
            ImageDraw.Draw(card).text((0, height + 4 + i * line), text, fill="black", font=letters)
        cards.append(card)
    return _arrange(cards, columns, gap=12)


def _arrange(pictures: Sequence[Image.Image], columns: int | None, gap: int) -> Image.Image:
    n, (width, height) = len(pictures), pictures[0].size
    columns = columns or _columns(n)
    rows = math.ceil(n / columns)
    grid = Image.new(
        "RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), color="white"
    )
    for i, picture in enumerate(pictures):
        row, column = divmod(i, columns)
        grid.paste(picture, (column * (width + gap), row * (height + gap)))
    return grid


@cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, `size` pixels: it has Latin, Greek and Cyrillic, where Pillow's has ASCII."""
    import matplotlib  # a fifth of a second, and few ask for text

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)


def wrap_text(
    text: str, width: float, font: ImageFont.FreeTypeFont, *, max_lines: int
) -> list[str]:
    """`text` in at most `most` lines of `width` pixels.

    A word that is too long is cut in two, and a text that is too long ends in "...".
    """
    lines, line = [], ""
    # Half an emoji has no UTF-8, and 2000 letters fill any four lines.
    words = text.encode("utf-8", "replace").decode("utf-8")[:2000].split()
    for word in words:
        for piece in _pieces(word, width, font):
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


def _pieces(word: str, width: float, font: ImageFont.FreeTypeFont) -> list[str]:
    """A word, in parts where it is wider than the line."""
    pieces = [""]
    for letter in word:
        if pieces[-1] and font.getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def save_png(image: Image.Image, path: Path, facts: dict) -> None:
    """A PNG that carries `facts` as text, one entry each; anything but text is stored as JSON.

    It replaces what was at `path` as a whole.
    """
    info = PngInfo()
    for key, value in facts.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        info.add_itxt(key, text.encode("utf-8", "replace"))  # half an emoji becomes "?"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as file:
        image.save(file, format="PNG", pnginfo=info)


def load_png(path: Path) -> tuple[Image.Image, dict]:
    """What `save_png` has stored: the picture and its facts.

    Raises ValueError, which names the file, for what is no PNG.
    """
    try:
        data = io.BytesIO(read_regular_file(path, max_bytes=MAX_PNG_BYTES))
        with warnings.catch_warnings(), Image.open(data, formats=["PNG"]) as image:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            facts = {key: _fact(text) for key, text in image.text.items()}
            return image.convert("RGB"), facts
    except Exception as error:  # Pillow's readers have many ways to say that a file is damaged
        raise ValueError(f"{path} is no PNG that can be read ({error})") from error


def _fact(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _columns(n: int) -> int:
    """As square as goes, or one column wider where that leaves fewer holes."""
    square = math.ceil(math.sqrt(n))
    return min(square, square + 1, key=lambda columns: -n % columns)
