"""One file in the original layout of Stable Diffusion as a published model: its folder."""

import os
from functools import cache
from pathlib import Path

from ldm.utils.files import resolve_path

CONVERSION_CACHE = Path("data/cache")  # that of servers' shards, and of real images' features
ORIGINAL_SUFFIXES = (".safetensors", ".ckpt")


def is_original(location: str) -> bool:
    """Whether a location is one file of weights from elsewhere, and not of a run."""
    path = os.path.expanduser(location)
    is_file = path.endswith(ORIGINAL_SUFFIXES) and os.path.isfile(path)
    if not is_file or os.path.exists(f"{path}.json"):  # the manifest of a run's checkpoint
        return False
    from ldm.models.original_file import is_original_file  # torch

    return is_original_file(Path(path))


@cache  # a command opens a location several times, and the lines about it are for once
def locate_original(location: str) -> Path:
    """The folder that a file is converted to; CheckpointError for a file that is not opened."""
    from ldm.models.original_layout import open_original_file

    return open_original_file(resolve_path(location), cache=CONVERSION_CACHE.absolute())


def is_of_model(place: str, init: str) -> bool:
    """Whether a component's path is inside of a published model, or of what a file became."""
    converted = CONVERSION_CACHE.absolute() / "original" / f"{Path(init).stem}-"
    return place.startswith((init, os.fspath(converted)))
