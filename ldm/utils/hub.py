"""Models of the Hugging Face hub, downloaded to its cache."""

from collections.abc import Sequence
from pathlib import Path

from ldm.utils.errors import UsageError


def download_snapshot(
    name: str,
    patterns: Sequence[str],
    *,
    subject: str,
    remedy: str,
    ignored: Sequence[str] | None = None,
) -> Path:
    """Returns the local copy of the files of a model; UsageError, with the remedy, without one.

    patterns, ignored: of names of files. subject: the beginning of the message.
    """
    from huggingface_hub import snapshot_download  # slow to import

    try:
        folder = snapshot_download(name, allow_patterns=patterns, ignore_patterns=ignored)
    except Exception as error:  # of many types
        raise UsageError(
            f"{subject} is neither here nor to be had from huggingface.co "
            f"({type(error).__name__}): {remedy}"
        ) from error
    return Path(folder)
