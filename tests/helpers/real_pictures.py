"""Real pictures for tests, as uint8 tensors (3, H, W)."""

import os
from pathlib import Path

import pytest
from torch import Tensor

from ldm.data.image_decoding import crop_and_resize, pil_to_tensor, read_image, resize_short_side

ROOT = Path(os.environ.get("LDM_TEST_DATA", "/work/shared/data"))


def folder(name: str) -> Path:
    """A folder of real pictures; the test is skipped where the machine has none."""
    if not (ROOT / name).is_dir():
        pytest.skip(f"no {ROOT / name} here")
    return ROOT / name


def emoji(n: int) -> list[Tensor]:
    """n emoji of 64 x 64 pixels, spread over the set."""
    files = sorted(folder("emoji64").glob("images/*.png"))
    return [pil_to_tensor(read_image(file)) for file in files[:: len(files) // n][:n]]


def coco(n: int) -> list[Tensor]:
    """The first n photographs, each in its own size."""
    files = sorted(folder("coco_mini").glob("val2017/*.jpg"))[:n]
    return [pil_to_tensor(read_image(file)) for file in files]


def squares(n: int, size: int) -> list[Tensor]:
    """The middle of the first n photographs."""
    files = sorted(folder("coco_mini").glob("val2017/*.jpg"))[:n]
    small = [resize_short_side(read_image(file), size) for file in files]
    return [pil_to_tensor(crop_and_resize(image, size)) for image in small]
