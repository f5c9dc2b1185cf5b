"""The buckets of the training and of the validation images of a run.

Shapes: N images; sizes of images are (width, height), target sizes (height, width).
"""

from collections.abc import Sequence

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
    sizes: Sequence[Sequence[int]] | None,
    *,
    pixels: int,
    grid: int,
    batch: int,
) -> tuple[Buckets, Buckets]:
    """Returns the buckets of training and validation images of these sizes (N, 2).

    sizes: None for those of about `pixels` each, with sides in multiples of `grid`, that fill a
    batch of training images.
    """
    if sizes is None:
        found = assign_buckets(train, list_bucket_sizes(pixels, multiple=grid))
        found = merge_small_buckets(found, train, minimum=batch)
    else:
        found = assign_buckets(train, sizes)
        warn_of_small_buckets(found, minimum=batch)
    return found, assign_buckets(val, found.sizes)


def get_target_sizes(buckets: Buckets) -> np.ndarray:
    """Returns the target size (N, 2) of each image."""
    return np.array(buckets.sizes, np.int32)[buckets.bucket][:, ::-1]


def number_target_sizes(sizes: np.ndarray | None) -> np.ndarray | None:
    """Returns a number (N,) for each target size (N, 2), equal ones for equal sizes."""
    return None if sizes is None else np.unique(sizes, axis=0, return_inverse=True)[1].ravel()
