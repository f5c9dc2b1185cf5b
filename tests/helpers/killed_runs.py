"""How runs that were killed compare with one that never was."""

from shell import rows


def measured(run_dir):
    """metrics.csv without what a clock says."""
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows(run_dir)]
