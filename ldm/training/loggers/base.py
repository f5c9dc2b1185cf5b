"""What a run tells its loggers."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from PIL import Image


class RunLogger(Protocol):
    """A Lightning logger of a run; each method does nothing unless a logger overrides it."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs values of one optimizer step."""
        return

    def log_image(self, key: str, images: Sequence[Image.Image], step: int | None = None) -> None:
        """Logs images of one optimizer step."""
        return

    def log_table(self, key: str, columns: Sequence[str], data: Sequence[Sequence]) -> None:
        """Logs a table."""
        return

    def rewind(self, step: int) -> None:
        """Drops what was logged after `step`, where a run resumes."""
        return

    def save(self) -> None:
        """Writes what was logged so far to the disk."""
        return

    def finish(self, *, failed: bool) -> None:
        """Closes the run's log."""
        return
