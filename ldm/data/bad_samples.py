"""Samples that could not be used: counted by reason, told once a reason, and not too many."""

import logging
from collections import Counter
from typing import NamedTuple

MIN_ALLOWED_SKIPS = 10  # one bad sample among the first hundred is no reason to stop
_log = logging.getLogger(__name__)


class BadSample(NamedTuple):
    """One sample that was replaced by another: why, and in full with shard and key."""

    reason: str
    message: str


class TooManySkippedError(RuntimeError):
    """More samples could not be used than the run was told to bear."""


class BadSampleCounter:
    """What one process has skipped since it started, of one data set.

    counts: positions whose own sample was replaced, by reason; seen: all positions.
    Raises ValueError for a share that is none.
    """

    def __init__(self, name: str, *, limit: float) -> None:
        if not 0 <= limit <= 1:
            raise ValueError(f"max_skipped is a share of the samples, in 0..1, got {limit}")
        self.name, self.limit = name, limit
        self.seen = 0
        self.counts: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Skipped positions of all reasons."""
        return self.counts.total()

    def add(self, seen: int, skipped: list[BadSample]) -> None:
        """Take in a batch of `seen` samples, of which these were replaced.

        Raises TooManySkippedError above the limit, which never is below `ALWAYS_ALLOWED`.
        """
        self.seen += seen
        for skip in skipped:
            if skip.reason not in self.counts:
                _log.warning(
                    "%s: skipped, the next sample takes its place; more like it are only counted",
                    skip.message,
                )
            self.counts[skip.reason] += 1
        if skipped and self.total > max(MIN_ALLOWED_SKIPS, self.limit * self.seen):
            raise TooManySkippedError(
                f"{self.name}: {self.total} of {self.seen} samples could not be decoded "
                f"({self.describe()}), the last being {skipped[-1].message}. Allowed are "
                f"{MIN_ALLOWED_SKIPS} or data.max_skipped={self.limit:g} of those seen: mend the "
                "shards, or raise it"
            )

    def describe(self) -> str:
        """The counts by reason, most frequent first, in words."""
        return format_skip_counts(self.counts)


def format_skip_counts(counts: Counter[str]) -> str:
    """Counts by reason, most frequent first, in words."""
    return ", ".join(f"{reason}: {count}" for reason, count in counts.most_common())
