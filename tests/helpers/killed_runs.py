"""How runs that were killed compare with one that never was."""

from shell import rows

TIMED = ("perf/images_per_s", "perf/data_wait", "perf/eval_share")


def measured(run_dir):
    """metrics.csv without what a clock says."""
    return [{k: v for k, v in row.items() if k not in TIMED} for row in rows(run_dir)]
