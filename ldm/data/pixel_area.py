"""The area of images as a user writes it, and the square of an area; needs no numpy or torch."""

import math
import re
from collections.abc import Mapping, Sequence

USUAL_SIDE = 64


def parse_pixels(pixels: int | str) -> int:
    """Returns an area in pixels: a number, or sides such as 512*512; ValueError for all else."""
    match = re.fullmatch(r"(\d{1,5})\*(\d{1,5})|(\d{1,9})", str(pixels))
    area = math.prod(int(part) for part in match.groups() if part) if match else 0
    if area < 1:
        raise ValueError(
            f"data.pixels={pixels} is no area of images: give one such as 512*512, or a number"
        )
    return area


def are_bucket_sizes(buckets: object) -> bool:
    """Whether these are pairs of a width and a height, one at least."""
    return (
        isinstance(buckets, Sequence)
        and not isinstance(buckets, str)
        and len(buckets) > 0
        and all(
            isinstance(size, Sequence)
            and len(size) == 2
            and all(type(side) is int and side > 0 for side in size)
            for size in buckets
        )
    )


def compute_square_side(
    pixels: int | str | None, buckets: Sequence[Sequence[int]] | str | None
) -> int:
    """Returns the side of the square that has about the area of these settings of data.

    It is a multiple of 64, or of 8 where it is below 256, unless the area is a square number. Of
    listed sizes it is a multiple of the largest power of 2, up to 64, that divides all sides.
    """
    if pixels is not None:
        area = parse_pixels(pixels)
        step = 8 if math.isqrt(area) < 256 else 64
    elif are_bucket_sizes(buckets):
        area = round(sum(math.prod(size) for size in buckets) / len(buckets))
        step = math.gcd(64, *(side for size in buckets for side in size))
        return max(round(math.sqrt(area) / step), 1) * step
    else:
        return USUAL_SIDE
    side = math.isqrt(area)
    return side if side * side == area else max(round(side / step), 1) * step


def find_bucket_areas(data: Mapping) -> tuple[int, int] | None:
    """Returns the smallest and largest area of the buckets of data's settings; None without any."""
    buckets, pixels = data.get("buckets"), data.get("pixels")
    if buckets is None:
        return None
    if isinstance(buckets, str):
        area = parse_pixels(pixels or data["size"] ** 2)
        return area, area
    areas = [math.prod(size) for size in buckets]
    return min(areas), max(areas)
