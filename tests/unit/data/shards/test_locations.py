import os
from pathlib import Path

import pytest
from material import samples, tar_bytes

from ldm.data.shards.cache import ShardCache
from ldm.data.shards.index import ReadOptions, open_index
from ldm.data.shards.locations import locate_shards
from ldm.data.shards.remote import RemoteShard


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """Two folders of three shards each."""
    for folder in ("a", "b"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for n in range(3):
            path = tmp_path / "data" / folder / f"train-{n:04}.tar"
            path.write_bytes(tar_bytes(samples(1, first=n)))
        (tmp_path / "data" / folder / "notes.txt").write_text("no shard")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(source) -> list[str]:
    return [str(place) for place in locate_shards(source)]


def test_globs_ranges_folders_and_files(here):
    a, b = ([f"data/{x}/train-{n:04}.tar" for n in range(3)] for x in "ab")
    assert names("data/a") == a
    assert names("data/*/train-*.tar") == names("data/*") == names("data/**/*.tar") == a + b
    assert names("data/a/train-{0000..0002}.tar") == a
    assert names("data/{b,a}/train-000[01].tar") == b[:2] + a[:2]
    assert names("data/{b,a}") == b + a
    assert names(["data/a", "data/b/train-0001.tar", "data/a"]) == [*a, b[1], *a]
    assert names(f"file://{here}/data/a") == [str(here / one) for one in a]


def test_an_existing_name_is_not_expanded(here):
    for odd in ("{x,y}.tar", "[ab].tar", "a*.tar"):
        Path(odd).write_bytes(tar_bytes(samples(1)))
        assert names(odd) == [odd]


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("data/c/*.tar", r"no \.tar shards match data/c/\*\.tar"),
        ("data/a/train-{0000..0004}.tar", r"no shards at data/a/train-0003\.tar"),
        ("data/a/*.txt", "no .tar shards match"),
        ("data/absent", "no shards at data/absent"),
        ("data", "no .tar shards in data itself, but in data/a, data/b"),
    ],
)
def test_missing_files_are_named(here, source, told):
    with pytest.raises(FileNotFoundError, match=told):
        locate_shards(source)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("data/{0..3.tar", "a brace is not closed"),
        ("data/{0..99999999999}.tar", "more than 1,000,000 shards"),
        ("nope://host/a.tar", "no protocol called nope://"),
        ("s3://bucket/a.tar", r"s3://bucket/a\.tar: .*s3fs"),
        ("s3://key:s3cret@bucket/a.tar", r"s3://bucket/a\.tar: a password .*the environment"),
        ("https://joe:s3cret@host/{0..3}.tar", r"https://host/0\.tar: a password .*netrc"),
        ("gs://bucket/{0..3}.tar", "gcsfs"),
        ("https://host/*.tar", "range such as"),
        ("https://host/a.tar::https://host/b.tar", "a list"),
        ("simplecache::https://host/a.tar", "a list"),
    ],
)
def test_bad_sources_are_refused_with_a_remedy(here, source, told):
    with pytest.raises(ValueError, match=told) as error:
        locate_shards(source)
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize(
    "command", ["pipe:touch marker", " pipe:touch marker", "|touch marker", "pipe:touch {marker,m}"]
)
def test_commands_are_refused_and_not_run(here, command):
    for source in (command, ["data/a", command]):
        with pytest.raises(ValueError, match="may not do: stage the shards"):
            locate_shards(source)
    for harmless in ("$(touch marker)", "`touch marker`", "a;touch marker", "a\ntouch marker"):
        with pytest.raises(FileNotFoundError):
            locate_shards(harmless)
    assert not (here / "marker").exists()


def test_servers_and_folders_in_one_list(here, web):
    web.files = {f"/r-{n}.tar": tar_bytes(samples(2, first=10 * n)) for n in range(2)}
    source = ["data/a", web.url("/r-{0..1}.tar"), "data/b/train-0001.tar"]
    places = locate_shards(source)
    assert [isinstance(place, RemoteShard) for place in places] == [False] * 3 + [True] * 2 + [
        False
    ]
    index = open_index(source, ReadOptions(cache=ShardCache("cache", gigabytes=1)))
    keys = ["0000", "0001", "0002", "0000", "0001", "0010", "0011", "0001"]
    assert [index.key(i) for i in range(len(index))] == keys


def test_any_other_file_system_can_be_searched(here):
    """fsspec's memory file system, in place of a bucket."""
    import fsspec

    memory = fsspec.filesystem("memory")
    for n in range(2):
        memory.pipe(f"/bucket/{n}.tar", tar_bytes(samples(2, first=2 * n)))
    for source in ("memory://bucket", "memory://bucket/*.tar", "memory://bucket/{0..1}.tar"):
        index = open_index(source, ReadOptions(cache=ShardCache(here / "cache", gigabytes=1)))
        assert [index.key(i) for i in range(4)] == ["0000", "0001", "0002", "0003"]
    with pytest.raises(FileNotFoundError, match=r"no \.tar shards at memory://empty"):
        locate_shards("memory://empty")


def test_the_index_of_a_glob_is_saved_in_the_cache(here):
    cache = ShardCache("cache", gigabytes=1)
    assert len(open_index("data/*/*.tar", ReadOptions(cache=cache))) == 6
    (kept,) = cache.folder.glob("index-*.npz")
    stamp = kept.stat().st_mtime_ns
    assert len(open_index("data/*/*.tar", ReadOptions(cache=cache))) == 6
    assert kept.stat().st_mtime_ns == stamp
    Path("data/b/train-0002.tar").write_bytes(tar_bytes(samples(4)))
    assert len(open_index("data/*/*.tar", ReadOptions(cache=cache))) == 9


def test_a_pipe_among_shards_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    for source in (tmp_path, f"{tmp_path}/*.tar"):
        with pytest.raises(ValueError, match=r"a\.tar is no file"):
            locate_shards(source)
