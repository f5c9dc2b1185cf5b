"""Pictures out of tensors, and onto the disk with what made them.

Shapes: n images, H W pixels.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm.files import replacing


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (n, 3, H, W) in [-1, 1] to bytes (n, H, W, 3), rounded."""
    pixels = (images.detach().float().clamp(-1, 1) + 1) * 127.5
    return pixels.round().byte().permute(0, 2, 3, 1).cpu().numpy()


def to_pil(image: Tensor) -> Image.Image:
    """One image (3, H, W) in [-1, 1] as a picture."""
    return Image.fromarray(to_uint8(image[None])[0])


def tile(
    images: Sequence[Tensor] | Tensor, *, columns: int | None = None, gap: int = 2
) -> Image.Image:
    """One picture of n images (3, H, W) in [-1, 1], as square an arrangement as goes."""
    n, (_, height, width) = len(images), images[0].shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    grid = Image.new(
        "RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), color="white"
    )
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        grid.paste(to_pil(image), (column * (width + gap), row * (height + gap)))
    return grid


def save_png(image: Image.Image, path: Path, facts: dict) -> None:
    """A PNG that carries `facts` as text, one entry each; anything but text is stored as JSON.

    It replaces what was at `path` as a whole.
    """
    info = PngInfo()
    for key, value in facts.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        info.add_itxt(key, text.encode("utf-8", "replace"))  # half an emoji becomes "?"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        image.save(file, format="PNG", pnginfo=info)
