"""Text files of the user, and files that no other is to replace."""

import codecs
import os
from errno import ENOSPC

import pytest

from ldm.config.command_line import convert_to_usage_errors
from ldm.utils.checkpoint_file import prune_checkpoints
from ldm.utils.errors import UsageError
from ldm.utils.files import check_writable, delete_temporary_files, read_text, replace_file

TEXT = "a fox 🦊\nschön\n"


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        codecs.BOM_UTF8 + TEXT.encode(),
        codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    ],
    ids=["UTF-8", "UTF-8 with mark", "UTF-16, little end first", "UTF-16, big end first"],
)
def test_text_is_read_without_its_byte_order_mark(tmp_path, data):
    (tmp_path / "a.txt").write_bytes(data)
    assert read_text(tmp_path / "a.txt") == TEXT
    assert read_text(str(tmp_path / "a.txt")) == TEXT


@pytest.mark.parametrize(
    "data",
    [
        "schön".encode("latin-1"),
        "a fox".encode("utf-16-le"),  # without a mark it is UTF-8 with a NUL after each letter
        codecs.BOM_UTF16_LE + b"a",
        codecs.BOM_UTF32_LE + "a fox".encode("utf-32-le"),
        b"\x89PNG\r\n\x1a\n\0\0",
    ],
    ids=["Latin-1", "UTF-16 without mark", "half a letter", "UTF-32", "a picture"],
)
def test_files_that_are_no_text_are_refused(tmp_path, data):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.txt is neither UTF-8 nor UTF-16 with a byte order"):
        read_text(tmp_path / "a.txt")


def test_only_temporary_files_are_deleted(tmp_path):
    with replace_file(tmp_path / "a.tar") as file:
        left = file.name.rpartition("/")[2]
        (tmp_path / f"{left}.tmp").touch()
    (tmp_path / left).touch()
    others = ["notes.tmp", "probe.tmp", "a.12345.tmp", f"{left}.tmp"]
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / "b.0a1b2c3d.tmp").mkdir()  # not ours to empty
    check_writable(tmp_path)
    prune_checkpoints(tmp_path, 1)
    delete_temporary_files(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar", "b.0a1b2c3d.tmp", *others}


def test_the_error_of_a_full_disk_names_the_file(tmp_path):
    with (
        pytest.raises(UsageError, match=rf"^{tmp_path}/a\.png: No space left on device \["),
        convert_to_usage_errors(),
        replace_file(tmp_path / "a.png"),
    ):
        raise OSError(ENOSPC, os.strerror(ENOSPC))
    assert list(tmp_path.iterdir()) == []
