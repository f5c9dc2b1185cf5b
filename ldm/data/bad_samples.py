"""Counts the samples that could not be decoded, warns once a reason, and stops at too many."""

import logging
from collections import Counter
from typing import NamedTuple

MIN_ALLOWED_SKIPS = 10  # one bad sample among the first hundred is no reason to stop
_log = logging.getLogger(__name__)


class BadSample(NamedTuple):
    """A sample that another one replaces: the reason, and a message with shard and key."""

    reason: str
    message: str


class TooManySkippedError(RuntimeError):
    """More samples could not be decoded than `max_skipped` allows."""


class BadSampleCounter:
    """Counts what one process has skipped of one data set since it started.

    counts: replaced samples, by reason; seen: all samples; limit: the largest share of skips.
    """

    def __init__(self, name: str, *, limit: float) -> None:
        if not 0 <= limit <= 1:
            raise ValueError(f"max_skipped is a share of the samples, in 0..1, got {limit}")
        self.name, self.limit = name, limit
        self.seen = 0
        self.counts: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.counts.total()

    def add(self, seen: int, skipped: list[BadSample]) -> None:
        """Counts a batch of `seen` samples; raises TooManySkippedError above the limit."""
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
                f"({format_skip_counts(self.counts)}), the last being {skipped[-1].message}. "
                f"Allowed are {MIN_ALLOWED_SKIPS} or data.max_skipped={self.limit:g} of those "
                "seen: mend the shards, or raise it"
            )


def format_skip_counts(counts: Counter[str]) -> str:
    """Returns the counts by reason, most frequent first."""
    return ", ".join(f"{reason}: {count}" for reason, count in counts.most_common())
