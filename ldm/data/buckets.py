"""Aspect-ratio buckets: the sizes that images are cropped to, and the one for each image.

Shapes: N images, B buckets. A size is (width, height) in pixels, a target size (height, width).
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

# Podell et al. 2023 (SDXL), appendix I: "multi-aspect" sizes from 1:4 to 4:1.
MAX_ASPECT = 4
AREA_TOLERANCE = 1 / 8  # its list has sizes of 0.9 to 1 times the area
_CHUNK = 2**16  # images at a time
_log = logging.getLogger(__name__)

ImageSize = tuple[int, int]


def list_bucket_sizes(pixels: float, *, multiple: int) -> list[ImageSize]:
    """Returns sizes whose sides are multiples of `multiple`, of about `pixels` each, by aspect.

    For each side these are the other side that comes nearest to `pixels`, and the one beyond
    within an eighth of the area, up to an aspect of 4; and the nearest square.
    """
    if multiple < 1 or pixels < multiple**2:
        raise ValueError(
            f"buckets of {pixels:g} pixels with sides in multiples of {multiple}: one has "
            f"{multiple**2} pixels at least"
        )
    square = round(math.sqrt(pixels) / multiple) * multiple
    sizes = {(square, square)}
    for side in range(multiple, math.ceil(math.sqrt(pixels * MAX_ASPECT)) + 1, multiple):
        steps = pixels / side / multiple
        for other in (max(1, n) * multiple for n in (math.floor(steps), math.ceil(steps))):
            is_near = other == max(1, round(steps)) * multiple
            is_near |= abs(side * other / pixels - 1) <= AREA_TOLERANCE
            if is_near and max(side, other) <= MAX_ASPECT * min(side, other):
                sizes |= {(side, other), (other, side)}
    return sorted(sizes, key=lambda size: size[0] / size[1])


@dataclass(frozen=True)
class Buckets:
    """The bucket of each image: the one of `sizes` to which its crop cuts away least of it.

    sizes: of the B buckets; bucket (N,) int32: number of each image's; cut (N,) float32: the share
    of its area that is cut away.
    """

    sizes: list[ImageSize]
    bucket: np.ndarray
    cut: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """The number of images (B,) of each bucket."""
        return np.bincount(self.bucket, minlength=len(self.sizes))

    @property
    def target_sizes(self) -> np.ndarray:
        """The target size (N, 2) of each image."""
        return np.array(self.sizes, np.int32)[self.bucket][:, ::-1]

    def summarize(self) -> dict[str, object]:
        """Returns the number of images of each size, and the mean share that is cut away."""
        counts = zip(self.sizes, self.counts.tolist(), strict=True)
        images = {f"{width}x{height}": count for (width, height), count in counts}
        return {"images": images, "cut_away": float(self.cut.mean()) if len(self.cut) else 0.0}

    def describe(self) -> str:
        """Returns a line on the buckets, their shares of the images, and what is cut away."""
        shares = self.counts / max(len(self.bucket), 1)
        order = np.argsort(-shares, kind="stable")
        each = ", ".join(
            f"{self.sizes[b][0]}x{self.sizes[b][1]} {shares[b]:.1%}" for b in order if shares[b]
        )
        cut = self.cut if len(self.cut) else np.zeros(1)
        return f"buckets: {each}; cut away: {cut.mean():.1%} of an image, {cut.max():.1%} at most"


def assign_buckets(image_sizes: np.ndarray, sizes: Sequence[Sequence[int]]) -> Buckets:
    """Returns the bucket of each image of `image_sizes` (N, 2).

    Of buckets that cut equally much, it is that of the nearest area, then the first. An image of
    size (0, 0), whose header cannot be read, counts as a square.
    """
    if not len(sizes) or any(len(size) != 2 or min(size) < 1 for size in sizes):
        raise ValueError(f"buckets are pairs [width, height] of pixels, got {list(sizes)}")
    known = np.where(image_sizes > 0, image_sizes, 1).astype(np.int64)
    packed, inverse = np.unique((known[:, 0] << 32) | known[:, 1], return_inverse=True)
    unique = np.stack([packed >> 32, packed & (2**32 - 1)], axis=1)
    parts = [unique[i : i + _CHUNK] for i in range(0, len(unique), _CHUNK)]
    found = [_choose(part, np.array(sizes, np.int64)) for part in parts]
    bucket = np.concatenate([np.empty(0, np.int32), *(bucket for bucket, _ in found)])
    kept = np.concatenate([np.empty(0), *(kept for _, kept in found)])
    cut = (1 - kept).astype(np.float32)
    return Buckets([(w, h) for w, h in sizes], bucket[inverse], cut[inverse])


def _choose(images: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the bucket and the share that it keeps of each image (n, 2)."""
    # Quotients of integers: the same on every machine, and equal where they are equal.
    across, down = images[:, :1] * sizes[:, 1], images[:, 1:] * sizes[:, 0]
    kept = np.minimum(across, down) / np.maximum(across, down)
    best = kept.max(axis=1)
    areas, own = sizes.prod(axis=1), images.prod(axis=1, keepdims=True)
    nearness = np.minimum(areas, own) / np.maximum(areas, own)
    bucket = np.where(kept == best[:, None], nearness, -1).argmax(axis=1)
    return bucket.astype(np.int32), best


def merge_small_buckets(buckets: Buckets, image_sizes: np.ndarray, *, minimum: int) -> Buckets:
    """Returns the buckets that have `minimum` images or more, with the images of the others.

    The smallest one goes first, its images to the next best; the last one stays whatever it has.
    """
    sizes, bucket, cut = np.array(buckets.sizes), buckets.bucket.copy(), buckets.cut.copy()
    counts = buckets.counts
    left = np.arange(len(sizes))
    while len(left) > 1 and counts[left].min() < minimum:
        smallest = left[counts[left].argmin()]
        left = left[left != smallest]
        moved = np.flatnonzero(bucket == smallest)
        again = assign_buckets(image_sizes[moved], sizes[left])
        bucket[moved], cut[moved] = left[again.bucket], again.cut
        counts = np.bincount(bucket, minlength=len(sizes))
    number = np.zeros(len(sizes), np.int32)
    number[left] = np.arange(len(left))
    return Buckets([buckets.sizes[b] for b in left], number[bucket], cut)


def warn_of_small_buckets(buckets: Buckets, *, minimum: int) -> None:
    """Warns about buckets with fewer images than a batch, which come once in several epochs."""
    small = [
        f"{width}x{height} ({count})"
        for (width, height), count in zip(buckets.sizes, buckets.counts, strict=True)
        if count < minimum
    ]
    if small:
        _log.warning(
            "data.buckets: %s: fewer images than a batch of %d, so a batch of them comes once in "
            "several epochs; leave such sizes out, or give data.buckets=auto",
            ", ".join(small),
            minimum,
        )


def choose_buckets(
    train: np.ndarray,
    val: np.ndarray,
    sizes: Sequence[Sequence[int]] | Literal["auto"] | None,
    *,
    side: int,
    pixels: int,
    grid: int,
    batch: int,
    own_sides: np.ndarray | None = None,
) -> tuple[Buckets, Buckets]:
    """Returns the buckets of training and validation images of these sizes (N, 2).

    sizes: "auto" for those of about `pixels` each, with sides in multiples of `grid`, that fill a
    batch of training images; None for squares of `side`. own_sides (N,): in place of `side`, and
    of `pixels`, for training images of data sets that have one; 0 for the others.
    """
    own_sides = np.zeros(len(train), np.int64) if own_sides is None else own_sides
    bucket, cut = np.empty(len(train), np.int32), np.empty(len(train), np.float32)
    joined, val_sizes = [], None
    for own in np.unique(own_sides).tolist():
        members = own_sides == own
        listed = _list_sizes(sizes, own or side, own**2 or pixels, grid)
        found = assign_buckets(train[members], listed)
        if sizes == "auto":
            found = merge_small_buckets(found, train[members], minimum=batch)
        elif sizes is not None:
            warn_of_small_buckets(found, minimum=batch)
        bucket[members], cut[members] = found.bucket + len(joined), found.cut
        joined += found.sizes
        val_sizes = val_sizes if own else found.sizes
    val_sizes = val_sizes or _list_sizes(sizes, side, pixels, grid)
    return Buckets(joined, bucket, cut), assign_buckets(val, val_sizes)


def _list_sizes(
    sizes: Sequence[Sequence[int]] | Literal["auto"] | None, side: int, pixels: int, grid: int
) -> Sequence[Sequence[int]]:
    if sizes is None:
        return [(side, side)]
    return list_bucket_sizes(pixels, multiple=grid) if sizes == "auto" else sizes


def number_target_sizes(sizes: np.ndarray | None) -> np.ndarray | None:
    """Returns a number (N,) for each target size (N, 2), equal ones for equal sizes."""
    if sizes is None:
        return None
    packed = (sizes[:, 0].astype(np.int64) << 32) | sizes[:, 1]
    return np.unique(packed, return_inverse=True)[1]
