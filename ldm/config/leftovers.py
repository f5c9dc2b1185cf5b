"""What a refused command leaves behind: no directory that was not there before it."""

import shutil
from pathlib import Path

from ldm.experiments.run_dir import rank
from ldm.utils.locks import claimed

# All that a run or a sweep has in its directory before anything is trained.
EARLY = {".hydra", ".lock", "train.log", "config.yaml", "multirun.yaml", "checkpoints"}
_new: list[Path] = []


def expect(directory: Path) -> None:
    """Note the directories that are about to be made for this one, itself included."""
    _new.extend(path for path in [*reversed(directory.parents), directory] if not path.exists())


def discard() -> None:
    """Delete the directories noted by `expect` that hold nothing which was trained or drawn.

    Those of another process, which began at the same time, stay.
    """
    while _new and rank() == 0:
        path = _new.pop()
        found = list(path.iterdir()) if path.is_dir() else []
        saved = list(path.glob("checkpoints/*"))
        if {each.name for each in found} <= EARLY and not saved and not claimed(path):
            shutil.rmtree(path, ignore_errors=True)
