"""What a refused command leaves behind: no directory that was not there before it."""

import shutil
from pathlib import Path

from ldm.experiments.run_dir import get_launcher_rank
from ldm.utils.locks import is_directory_locked

# All that a run or a sweep has in its directory before anything is trained.
UNTRAINED_RUN_FILES = {
    ".hydra",
    ".lock",
    "train.log",
    "config.yaml",
    "multirun.yaml",
    "checkpoints",
}
_new_directories: list[Path] = []


def register_new_directories(directory: Path) -> None:
    """Note the directories that are about to be made for this one, itself included."""
    _new_directories.extend(
        path for path in [*reversed(directory.parents), directory] if not path.exists()
    )


def remove_new_directories() -> None:
    """Delete the directories noted by `expect` that hold nothing which was trained or drawn.

    Those of another process, which began at the same time, stay.
    """
    while _new_directories and get_launcher_rank() == 0:
        path = _new_directories.pop()
        found = list(path.iterdir()) if path.is_dir() else []
        saved = list(path.glob("checkpoints/*"))
        if (
            {each.name for each in found} <= UNTRAINED_RUN_FILES
            and not saved
            and not is_directory_locked(path)
        ):
            shutil.rmtree(path, ignore_errors=True)
