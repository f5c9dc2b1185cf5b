"""The buckets of the training and of the validation images of a run.

Shapes: N images; sizes of images are (width, height), target sizes (height, width).
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ldm.data.buckets import (
    Buckets,
    assign_buckets,
    list_bucket_sizes,
    merge_small_buckets,
    warn_of_small_buckets,
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


def get_target_sizes(buckets: Buckets) -> np.ndarray:
    """Returns the target size (N, 2) of each image."""
    return np.array(buckets.sizes, np.int32)[buckets.bucket][:, ::-1]


def number_target_sizes(sizes: np.ndarray | None) -> np.ndarray | None:
    """Returns a number (N,) for each target size (N, 2), equal ones for equal sizes."""
    if sizes is None:
        return None
    packed = (sizes[:, 0].astype(np.int64) << 32) | sizes[:, 1]
    return np.unique(packed, return_inverse=True)[1]
