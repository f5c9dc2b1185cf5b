"""The run directories that this process makes: a refusal deletes those without any training."""

import shutil
from pathlib import Path

from ldm.experiments.run_dir import get_launcher_rank
from ldm.utils.locks import is_directory_locked

# The files that a run or a sweep has before anything is trained.
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
    """Notes the directories that are about to be made for this one, itself included."""
    paths = [*reversed(directory.parents), directory]
    _new_directories.extend(path for path in paths if not path.exists())


def remove_new_directories() -> None:
    """Deletes the noted directories that hold nothing trained or generated and that nobody uses."""
    while _new_directories and get_launcher_rank() == 0:
        path = _new_directories.pop()
        names = {each.name for each in path.iterdir()} if path.is_dir() else set()
        untrained = names <= UNTRAINED_RUN_FILES and not list(path.glob("checkpoints/*"))
        if untrained and not is_directory_locked(path):
            shutil.rmtree(path, ignore_errors=True)


def forget_new_directories() -> None:
    """Lets the noted directories stay, whatever comes."""
    _new_directories.clear()
