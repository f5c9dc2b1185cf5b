"""How runs that were killed compare with one that never was."""

import torch
from shell import rows

TIMED = ("perf/images_per_s", "perf/data_wait", "perf/eval_share")


def same(a, b) -> bool:
    """Whether two payloads hold the same plain values, and the same tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def measured(run_dir):
    """metrics.csv without what a clock says."""
    return [{k: v for k, v in row.items() if k not in TIMED} for row in rows(run_dir)]
