"""One process a directory: what a lock is worth when its holder, or its machine, is gone."""

import errno
import fcntl
import os
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from shell import ROOT, environment

from ldm.utils.locks import InUseError, is_directory_locked, lock_directory, machine_id

HOLD = """
import sys, time
from pathlib import Path
from ldm.utils import locks
file = locks.lock_directory(Path(sys.argv[1]))
if sys.argv[2]:  # as the process of another machine would have signed
    file.seek(0)
    file.truncate()
    file.write(f"process 7 on elsewhere\\n{sys.argv[2]}\\n".encode())
print("mine", flush=True)
time.sleep(float(sys.argv[3]))
"""


@contextmanager
def held(directory, *, machine="", seconds=60.0):
    """Another process that holds a directory, for a while."""
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory), machine, str(seconds)],
        env=environment(directory),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout.readline() == "mine\n"
        yield other
    finally:
        other.kill()
        other.wait()


def test_a_holder_on_this_machine_is_refused_at_once(tmp_path):
    with held(tmp_path) as other:
        began = time.monotonic()
        with pytest.raises(InUseError, match=f"process {other.pid} on [^\n]*: wait for it"):
            lock_directory(tmp_path)
        assert time.monotonic() < began + 5
    assert not is_directory_locked(tmp_path)


def test_a_link_is_no_lock(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "run/.lock").symlink_to("../thesis.txt")
    with pytest.raises(ValueError, match=r"\.lock is a link to \.\./thesis\.txt"):
        lock_directory(tmp_path / "run")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_holder_on_another_machine_is_waited_for(tmp_path, capsys):
    """A file server keeps the locks of a machine that has died for a while."""
    with held(tmp_path, machine="another", seconds=2):
        lock_directory(tmp_path, timeout=30).close()
    said = capsys.readouterr().out
    assert "process 7 on elsewhere" in said
    assert said.count("\n") == 1, "said once"


def test_the_timeout_error_has_a_remedy(tmp_path):
    with (
        held(tmp_path, machine="another"),
        pytest.raises(InUseError, match=r"process 7 on elsewhere.*delete .*/\.lock"),
    ):
        lock_directory(tmp_path, timeout=1)


def test_a_rebooted_machine_is_another_machine(tmp_path):
    lock_directory(tmp_path).close()
    signed = (tmp_path / ".lock").read_text().splitlines()
    assert signed[0].startswith(f"process {os.getpid()} on ")
    assert signed[1] == machine_id()


def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch):
    """As Lustre may be mounted."""

    def refuse(*args) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.warns(UserWarning, match="knows no locks .* nothing keeps a second process"):
        lock_directory(tmp_path).close()
    assert not is_directory_locked(tmp_path)
