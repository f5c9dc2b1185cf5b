"""Latents to images within bounds of memory: a few images at a time, large ones in tiles."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ldm.diffusion.samplers.tiled import compute_window_starts, make_window_weights
from ldm.models.temporal import fold_frames, unfold_frames

MAX_PIXELS_AT_ONCE = 2**20  # four images of 512x512, or frames
TILE_OVERLAP = 0.25  # of a tile's side


def decode_latents(autoencoder: nn.Module, latents: Tensor, *, tile: int | None = None) -> Tensor:
    """Images (B, 3, H, W) of latents (B, C, h, w), or videos (B, 3, F, H, W) of (B, C, F, h, w).

    tile: the side, in pixels, of the parts of a larger image; None decodes images as a whole.
    """
    if latents.ndim == 5:
        frames = latents.shape[2]
        images = decode_latents(autoencoder, fold_frames(latents), tile=tile)
        return unfold_frames(images, frames)
    decode, factor = autoencoder.decode, autoencoder.factor
    height, width = (min(n * factor, tile or n * factor) for n in latents.shape[-2:])
    parts = latents.split(max(1, MAX_PIXELS_AT_ONCE // (height * width)))
    if tile is not None and max(latents.shape[-2:]) * factor > tile:
        side = max(1, tile // factor)
        decode = partial(decode_in_tiles, decode, side=side, factor=factor)
    images = [decode(part) for part in parts]
    return images[0] if len(images) == 1 else torch.cat(images)


def decode_in_tiles(
    decode: Callable[[Tensor], Tensor], latents: Tensor, *, side: int, factor: int
) -> Tensor:
    """Images (B, 3, H, W) of latents (B, C, h, w) from tiles of `side` cells, which overlap.

    Each tile is decoded by itself. A decoder with attention or group norms, which see the whole
    image, gives another result than for the whole.
    """
    sides = [min(side, n) for n in latents.shape[-2:]]
    overlap = round(side * TILE_OVERLAP)
    starts = [
        compute_window_starts(*n, overlap) for n in zip(latents.shape[-2:], sides, strict=True)
    ]
    # To the fourth power: at its edge a tile differs most from the whole image.
    down, across = (make_window_weights(n * factor, overlap * factor).pow(4) for n in sides)
    weights = (down[:, None] * across).to(latents.device)  # of a tile's pixels
    shape = [n * factor for n in latents.shape[-2:]]
    images = latents.new_zeros((len(latents), 3, *shape), dtype=torch.float32)
    total = images.new_zeros(shape)
    for top in starts[0]:
        for left in starts[1]:
            corner = zip((top, left), sides, strict=True)
            cells = [slice(start, start + n) for start, n in corner]
            pixels = [slice(cut.start * factor, cut.stop * factor) for cut in cells]
            images[..., *pixels] += weights * decode(latents[..., *cells])
            total[*pixels] += weights
    return images / total
