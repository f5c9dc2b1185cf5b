"""A folder that is written whole or not at all."""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ldm.utils.files import TEMPORARY_SUFFIX
from ldm.utils.locks import hold_lock

LOCK_NAME = ".lock"  # in the temporary folder, while its process lives


@contextmanager
def make_folder_beside(out: Path) -> Iterator[Path]:
    """Yields an empty folder to fill and move to `out`; it lies in a temporary one beside `out`.

    Temporary folders of `out` whose process was killed are deleted.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    delete_abandoned_folders(out)
    with (
        tempfile.TemporaryDirectory(
            dir=out.parent, prefix=f".{out.name}.", suffix=TEMPORARY_SUFFIX
        ) as temporary,
        hold_lock(Path(temporary, LOCK_NAME)),
    ):
        folder = Path(temporary, out.name)
        folder.mkdir()
        yield folder


def delete_abandoned_folders(out: Path) -> None:
    """Deletes the temporary folders of `out` that no process holds."""
    name = re.compile(rf"\.{re.escape(out.name)}\.[a-z0-9_]{{8}}{re.escape(TEMPORARY_SUFFIX)}")
    for left in list(out.parent.iterdir()):
        if name.fullmatch(left.name) and left.is_dir() and not left.is_symlink():
            with suppress(OSError), hold_lock(left / LOCK_NAME, wait=False):
                shutil.rmtree(left)
