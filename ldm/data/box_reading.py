"""Reads training images at a size: by a fast decoder of JPEGs, if installed, and torch's resize.

The pixels are those of `image_decoding.crop_and_resize` but for three things: torch's resize rounds
otherwise (2 levels of 255), a JPEG much larger than the size is decoded at a fraction of its own
(10 levels; the crop moves by less than a pixel of that size), and the colours of a JPEG are
converted to sRGB after the resize. Shapes: h, w the sides of the size.
"""

import re
import struct
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ldm.data.color_profiles import find_srgb_transform
from ldm.data.image_decoding import (
    MAX_IMAGE_BYTES,
    MAX_IMAGE_PIXELS,
    TargetSize,
    find_crop_box,
    get_sides,
    read_image,
    read_raw_rgb,
)

try:
    import simplejpeg
except ImportError:  # the optional `ldm[fast]`
    simplejpeg = None

MIN_REDUCTION = 3  # a JPEG decoded at a fraction of its size has this many times the pixels wanted

_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive (ITU-T T.81, table B.1)
_SCAN, _APP1, _APP2 = 0xDA, 0xE1, 0xE2
# tables, restart interval, comment, and the APPn that say nothing about the pixels
_PASSED = {0xC4, 0xDB, 0xDD, 0xFE, 0xE0, *range(0xE3, 0xF0)}
_ORIENTATION = 0x0112  # EXIF 2.32, table 4
_TURNED_BY_XMP = re.compile(rb'(?<!/)tiff:Orientation(?!="1"|>1<)')
_ICC = b"ICC_PROFILE\0\1\1"  # ICC.1:2022, annex B.4: the only chunk of a profile


class PlainJpeg(NamedTuple):
    """The header of an upright JPEG of 8 bits, grey, or in three colours with their profile."""

    width: int
    height: int
    profile: bytes | None


def read_box(
    data: bytes, size: TargetSize, *, x: float = 0.5, y: float = 0.5, even: bool = False
) -> tuple[Tensor, tuple[int, int]]:
    """Returns the box of `find_crop_box`, uint8 (3, h, w), and the image's width and height.

    Raises ImageError like `read_image`.
    """
    header = find_plain_jpeg(data)
    if header is None:
        image = read_image(data)
        return resize_box(np.array(image), size, x=x, y=y, even=even), image.size
    pixels = _decode_jpeg(data, header, _choose_shrink(header, size))
    box = resize_box(pixels, size, x=x, y=y, even=even)
    if header.profile and (transform := find_srgb_transform(header.profile, "RGB")):
        image = Image.fromarray(box.permute(1, 2, 0).contiguous().numpy())
        box = torch.from_numpy(np.array(transform.apply(image))).permute(2, 0, 1)
    return box, (header.width, header.height)


def _choose_shrink(header: PlainJpeg, size: TargetSize) -> int:
    """Returns 8, 4, 2 or 1: the fraction of its size at which a JPEG has pixels enough."""
    height, width = (MIN_REDUCTION * side for side in get_sides(size))
    fits = (n for n in (8, 4, 2) if header.height >= n * height and header.width >= n * width)
    return next(fits, 1)


def resize_box(pixels: np.ndarray, size: TargetSize, *, x: float, y: float, even: bool) -> Tensor:
    """Crops the box of `find_crop_box` out of uint8 (H, W, 3), and resizes it to (3, h, w)."""
    height, width = pixels.shape[:2]
    left, top, w, h = find_crop_box(width, height, size, x=x, y=y, even=even)
    box = torch.from_numpy(pixels[top : top + h, left : left + w]).permute(2, 0, 1)
    if (h, w) == (sides := get_sides(size)):
        return box
    return F.interpolate(box[None], sides, mode="bicubic", antialias=True)[0]


def find_plain_jpeg(data: bytes) -> PlainJpeg | None:
    """Returns the header of a plain JPEG within our limits, or None for any other data.

    The segments are followed as libjpeg follows them, up to the first scan.
    """
    if not data.startswith(b"\xff\xd8") or len(data) > MAX_IMAGE_BYTES:
        return None
    width = height = components = 0
    seen, profile, at = set(), None, 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        segment = data[at + 4 : at + 2 + length]
        if marker == _SCAN:
            fits = 0 < width * height <= MAX_IMAGE_PIXELS and not (profile and components == 1)
            return PlainJpeg(width, height, profile) if fits else None
        if marker in _FRAMES and len(segment) >= 6 and not width:
            depth, height, width, components = struct.unpack(">BHHB", segment[:6])
            if depth != 8 or components not in (1, 3):
                return None
        elif marker == _APP2 and segment.startswith(_ICC) and profile is None:
            profile = segment[len(_ICC) :]
        elif not (marker in _PASSED or (marker == _APP1 and _is_upright(segment, seen))):
            return None
        at += 2 + length
    return None


def _is_upright(segment: bytes, seen: set[bytes]) -> bool:
    """Whether an APP1 segment, the first of its kind, says that the image is upright."""
    kind = segment[:6]
    if kind in seen:
        return False
    seen.add(kind)
    if kind != b"Exif\0\0":
        return _TURNED_BY_XMP.search(segment) is None
    try:
        exif = Image.Exif()
        exif.load(segment)
        return exif.get(_ORIENTATION, 1) == 1
    except Exception:  # damaged EXIF: Pillow's many kinds
        return False


def _decode_jpeg(data: bytes, header: PlainJpeg, shrink: int) -> np.ndarray:
    """Returns uint8 (H, W, 3) at a fraction of the size; ImageError for what Pillow refuses."""
    sides = -(-header.height // shrink), -(-header.width // shrink)
    if simplejpeg is not None:
        try:
            pixels = simplejpeg.decode_jpeg(
                data, min_height=sides[0], min_width=sides[1], min_factor=shrink
            )
        except ValueError:  # damaged, or odd: Pillow decides
            pass
        else:
            if pixels.shape == (*sides, 3):
                return pixels
    return np.array(read_raw_rgb(data, shrink=shrink))
