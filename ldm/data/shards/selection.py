"""Selects the samples of an index by a condition on their columns."""

import logging

import numpy as np

from ldm.data.shards.index_file import ShardIndex
from ldm.data.where import SampleFilter, count_missing
from ldm.utils.errors import UsageError

MEASURED_COLUMNS = ("width", "height", "aspect")  # of the pixels, whatever the json says
_log = logging.getLogger(__name__)


def select_samples(index: ShardIndex, condition: SampleFilter, name: str) -> ShardIndex:
    """Returns the samples that meet a condition; UsageError if none does. A line counts the others.

    width, height and aspect (width / height) are those of the upright pixels.
    """
    columns = dict(index.columns)
    if not set(condition.keys).isdisjoint(MEASURED_COLUMNS):
        width, height = np.where(index.sizes > 0, index.sizes, np.nan).T
        columns |= zip(MEASURED_COLUMNS, (width, height, width / height), strict=True)
    columns = {key: columns[key] for key in condition.keys}
    keep, left_out = condition.select(columns)
    reasons = ", ".join(f"{count} by {clause}" for clause, count in left_out.items())
    lacking = [f"{count} lack {key}" for key, count in count_missing(columns).items()]
    line = f'{name}: where="{condition.text}" keeps {keep.sum()} of {len(keep)} samples; left out: '
    line += "; ".join([reasons or "none", *lacking])
    if not keep.any():
        raise UsageError(line)
    _log.info("%s", line)
    return index.select(keep, skipped={})
