"""Random masks for the training of inpainting."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.rng import Generators, rand

STROKE_CORNERS = 4
MASK_KIND_BOUNDS = (0.35, 0.6, 0.85)  # shares of rectangles, strokes, half-planes; then all masked
_NUMBERS_PER_MASK = 1 + 2 * STROKE_CORNERS  # those of a stroke, which takes the most


def random_masks(images: Tensor, *, generator: Generators) -> Tensor:
    """Masks (B, 1, H, W) of images (B, 3, H, W): 1 in a rectangle, stroke or half-plane, or in all.

    Each mask has one pixel or more.
    """
    n, _, height, width = images.shape
    device = images.device
    numbers = rand((n, 1 + _NUMBERS_PER_MASK), generator, device=device).float()
    kind, *u = (part[:, None, None] for part in numbers.unbind(1))  # (B, 1, 1) each
    y = (torch.arange(height, device=device) + 0.5)[None, :, None] / height  # (1, H, 1)
    x = (torch.arange(width, device=device) + 0.5)[None, None, :] / width  # (1, 1, W)
    hidden = torch.ones(n, height, width, dtype=torch.bool, device=device)
    shapes = zip((_rectangle, _stroke, _half_plane), MASK_KIND_BOUNDS, strict=True)
    for shape, end in reversed(list(shapes)):
        hidden = torch.where(kind < end, shape(x, y, u), hidden)
    hidden[:, height // 2, width // 2] |= ~hidden.flatten(1).any(1)
    return hidden[:, None].float()


def _rectangle(x: Tensor, y: Tensor, u: list[Tensor]) -> Tensor:
    """Sides of 0.2 to 0.8, anywhere inside."""
    wide, high = 0.2 + 0.6 * u[0], 0.2 + 0.6 * u[1]
    left, top = (1 - wide) * u[2], (1 - high) * u[3]
    return (x >= left) & (x < left + wide) & (y >= top) & (y < top + high)


def _half_plane(x: Tensor, y: Tensor, u: list[Tensor]) -> Tensor:
    """One side of a line through the middle part, at any angle."""
    angle = 2 * math.pi * u[0]
    across, down = x - 0.25 - 0.5 * u[1], y - 0.25 - 0.5 * u[2]
    return across * angle.cos() + down * angle.sin() > 0


def _stroke(x: Tensor, y: Tensor, u: list[Tensor]) -> Tensor:
    """A polyline between random corners, 0.1 to 0.25 thick."""
    radius = 0.05 + 0.075 * u[0]
    corners = list(zip(u[1::2], u[2::2], strict=True))
    stroke = torch.zeros((), dtype=torch.bool, device=x.device)
    for (x0, y0), (x1, y1) in pairwise(corners):
        dx, dy = x1 - x0, y1 - y0
        length = (dx.square() + dy.square()).clamp(min=1e-12)
        along = (((x - x0) * dx + (y - y0) * dy) / length).clamp(0, 1)
        distance = (x - x0 - along * dx).square() + (y - y0 - along * dy).square()
        stroke = stroke | (distance < radius.square())
    return stroke
