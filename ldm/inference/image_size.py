"""Sizes of images as a user writes them; needs no torch."""

from collections.abc import Sequence


def simplify_image_size(size: int | Sequence[int] | None) -> int | tuple[int, int] | None:
    """One number for a square, else height and width."""
    if size is None or isinstance(size, int):
        return size
    height, width = size
    return height if height == width else (height, width)


def format_image_size(size: tuple[int, int]) -> str:
    """A size as a user writes it: one number for a square."""
    return str(size[0]) if size[0] == size[1] else f"[{size[0]},{size[1]}]"


def parse_image_size(size: int | Sequence[int], grid: int) -> tuple[int, int]:
    """Height and width; ValueError, with the next size that fits, unless multiples of `grid`."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if any(side % grid for side in sides):
        next_size = format_image_size(tuple(-(-side // grid) * grid for side in sides))
        raise ValueError(
            f"size={format_image_size(sides)}: this run generates multiples of {grid}: "
            f"size={next_size}"
        )
    return sides
