"""Shards made for a test, and the real data where this machine has it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from material import samples, tar_bytes
from web import Web, serve

REAL_DATA = Path(os.environ.get("LDM_TEST_DATA", "/work/shared/data"))


@pytest.fixture
def shard_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes shards with the given numbers of samples into a folder."""

    def write(*sizes: int) -> Path:
        folder = tmp_path / "shards"
        folder.mkdir()
        for number, size in enumerate(sizes):
            members = samples(size, first=sum(sizes[:number]))
            (folder / f"{number:05}.tar").write_bytes(tar_bytes(members))
        return folder

    return write


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """The path of a real data set, or a skipped test where this machine lacks it."""

    def find(name: str) -> Path:
        path = REAL_DATA / name
        if not path.exists():
            pytest.skip(f"{path} is not on this machine (set LDM_TEST_DATA)")
        return path

    return find


@pytest.fixture
def web(monkeypatch) -> Iterator[Web]:
    """A server without files yet."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = serve()
    yield server
    server.shutdown()
    server.server_close()
