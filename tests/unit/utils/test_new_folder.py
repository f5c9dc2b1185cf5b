"""A folder that is written whole or not at all, also after a kill."""

import subprocess
import sys

import pytest

from ldm.utils.new_folder import make_folder_beside

KILLED = """
import os, signal, sys
from pathlib import Path
from ldm.utils.new_folder import make_folder_beside
with make_folder_beside(Path(sys.argv[1])) as folder:
    (folder / "half").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def list_names(place):
    return sorted(path.name for path in place.iterdir())


def test_the_next_one_deletes_what_a_killed_one_left(tmp_path):
    out = tmp_path / "model [1]"
    assert subprocess.run([sys.executable, "-c", KILLED, str(out)], check=False).returncode == -9
    assert len(list_names(tmp_path)) == 1
    others = [".model [1].notes.tmp", ".model 1.abcdefgh.tmp", ".model [1].abcdefgh"]
    for name in others:
        (tmp_path / name).mkdir()
    with make_folder_beside(out) as folder:
        assert len(list_names(tmp_path)) == 4
        with make_folder_beside(out):
            assert folder.is_dir(), "its process lives"
        (folder / "whole").touch()
        folder.rename(out)
    assert list_names(tmp_path) == sorted([*others, "model [1]"])
    assert list_names(out) == ["whole"]


def test_a_folder_that_is_not_finished_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="broken"), make_folder_beside(tmp_path / "out"):
        raise ValueError("broken")
    assert list_names(tmp_path) == []
