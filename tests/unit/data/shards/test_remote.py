import base64
import os
import socket
import time

import pytest
from material import picture, samples, tar_bytes
from web import FAULTS

from ldm.data.shards import remote
from ldm.data.shards.cache import ShardCache
from ldm.data.shards.index import ReadOptions, open_index
from ldm.data.shards.remote import (
    NoRangesError,
    RemoteError,
    RemoteShard,
    describe_urls,
    download_shard,
    read_range,
    redact_url,
)

SHARD = tar_bytes(samples(3))
SECRETS = "?X-Amz-Signature=s3cret&part=1"


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(remote, "RETRY_WAIT", 0.01)
    monkeypatch.setattr(remote, "STALL_TIMEOUT", 0.4)


@pytest.fixture
def shard(web) -> RemoteShard:
    web.files["/a.tar"] = SHARD
    return describe_urls([web.url("/a.tar")])[0]


def test_a_server_describes_a_shard_and_gives_its_bytes(web, shard):
    assert (shard.size, shard.etag) == (len(SHARD), '"/a.tar-1"')
    for start, end in [(0, 1), (512, 700), (len(SHARD) - 1, len(SHARD)), (0, len(SHARD))]:
        assert read_range(shard, start, end) == SHARD[start:end]


@pytest.mark.parametrize("fault", FAULTS)
def test_transient_errors_are_retried(web, shard, tmp_path, fault):
    web.first(fault, 2)
    assert read_range(shard, 100, 900) == SHARD[100:900]
    web.first(fault, 2)
    download_shard(shard, tmp_path / "a.part")
    assert (tmp_path / "a.part").read_bytes() == SHARD
    if fault != "short":
        web.first(fault, 1, method="HEAD")
        assert describe_urls([shard.url]) == [shard]


@pytest.mark.parametrize("fault", FAULTS)
def test_permanent_errors_are_named_without_credentials(web, shard, tmp_path, fault):
    url = web.url("/a.tar", user="joe:passw0rd@") + SECRETS
    shard = RemoteShard(url, len(SHARD), shard.etag)
    web.first(fault, 1000)
    web.seen.clear()
    begun = time.perf_counter()
    for action in (
        lambda: read_range(shard, 0, 600),
        lambda: download_shard(shard, tmp_path / "p"),
    ):
        with pytest.raises(RemoteError, match=r"could not be read: .*tried 3 times") as error:
            action()
        for secret in ("joe", "passw0rd", "s3cret"):
            assert secret not in str(error.value) + repr(shard)
        assert f"http://127.0.0.1:{web.server_port}/a.tar" in str(error.value)
        assert error.value.__suppress_context__
    # aiohttp for itself tries again where a connection in use is reset.
    assert 2 * remote.MAX_TRIES <= len(web.seen) <= 4 * remote.MAX_TRIES
    assert time.perf_counter() - begun < 8


@pytest.mark.parametrize("name", ["/absent.tar", "/a.tar"])
def test_permanent_errors_are_not_retried(web, shard, name):
    if name == "/a.tar":
        web.fault = lambda *request: "403"
    web.seen.clear()
    wanted = (FileNotFoundError, "HTTP 404") if "absent" in name else (RemoteError, "HTTP 403")
    with pytest.raises(wanted[0], match=wanted[1]):
        describe_urls([web.url(name)])
    assert len(web.seen) == 2  # HEAD, and GET for servers that know no HEAD


def test_a_lost_server_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(
        RemoteError, match=rf"{port}/a\.tar could not be read: ClientConnector.*3 times"
    ):
        describe_urls([f"http://127.0.0.1:{port}/a.tar"])


def test_passwords_come_from_netrc_or_the_url(web, tmp_path, monkeypatch):
    web.files["/a.tar"] = SHARD
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login joe password passw0rd")
    basic = "Basic " + base64.b64encode(b"joe:passw0rd").decode()
    describe_urls([web.url("/a.tar")])
    assert web.users == {basic}
    (tmp_path / "netrc").write_text("")
    web.users.clear()
    (shard,) = describe_urls([web.url("/a.tar", user="joe:passw0rd@")])
    read_range(shard, 0, 9)
    assert web.users == {basic}


def test_a_download_continues(web, shard, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_CHUNK", 1000)
    web.fault = lambda method, name, span: "500" if span and span >= "bytes=3000" else None
    part = tmp_path / "a.part"
    with pytest.raises(RemoteError):
        download_shard(shard, part)
    assert part.read_bytes() == SHARD[:3000]
    web.fault = lambda *request: None
    web.seen.clear()
    download_shard(shard, part)
    assert part.read_bytes() == SHARD
    assert web.seen[0] == ("GET", "/a.tar", "bytes=3000-3999")


def test_a_server_without_ranges(web, shard, tmp_path):
    web.ranges = False
    with pytest.raises(NoRangesError):
        read_range(shard, 512, 600)
    (tmp_path / "a.part").write_bytes(SHARD[:1000])
    download_shard(shard, tmp_path / "a.part")
    assert (tmp_path / "a.part").read_bytes() == SHARD
    cache = ShardCache(tmp_path / "cache", gigabytes=1)
    assert len(open_index(shard.url, ReadOptions(cache=cache))) == 3


def test_a_part_that_is_too_long_is_downloaded_again(shard, tmp_path):
    (tmp_path / "a.part").write_bytes(SHARD + b"x")
    download_shard(shard, tmp_path / "a.part")
    assert (tmp_path / "a.part").read_bytes() == SHARD


def test_a_shard_replaced_on_the_server_is_an_error(web, shard, tmp_path):
    web.version = 2
    with pytest.raises(RemoteError, match="replaced on its server"):
        download_shard(shard, tmp_path / "a.part")
    assert not (tmp_path / "a.part").exists()


def test_copies_are_named_by_address_size_and_etag():
    def name(url: str, size: int = 5, etag: str = "e") -> str:
        return RemoteShard(url, size, etag).name

    plain = name("https://h/a.tar?part=1")
    assert name("https://joe:pw@h/a.tar?part=1&X-Amz-Signature=1&X-Amz-Date=2") == plain
    others = [name("https://h/a.tar?part=2"), name("https://g/a.tar?part=1")]
    others += [name("https://h/a.tar?part=1", size=6), name("https://h/a.tar?part=1", etag="f")]
    assert len({plain, *others}) == 5
    for hostile in (
        "https://h/..%2F..%2Fx.tar",
        "https://h/a/../../etc",
        "https://h/" + "x" * 5000,
    ):
        assert "/" not in name(hostile)
        assert len(name(hostile)) < 200
    assert redact_url("s3://key:secret@bucket/a.tar?sig=1") == "s3://bucket/a.tar"


def test_the_index_reads_headers_only_and_is_saved(web, tmp_path):
    big = [(f"{n}.{kind}", data) for n in range(4) for kind, data in
           (("png", picture() + os.urandom(300_000)), ("txt", b"x"))]  # fmt: skip
    web.files |= {"/00.tar": tar_bytes(big), "/01.tar": SHARD}
    for name, data in web.files.items():
        (tmp_path / name[1:]).write_bytes(data)
    cache = ShardCache(tmp_path / "cache", gigabytes=1)
    source = web.url("/{00..01}.tar")
    index = open_index(source, ReadOptions(cache=cache))
    local = open_index(tmp_path)
    for part in ("shard", "members", "key_bytes", "key_ends"):
        assert (getattr(index, part) == getattr(local, part)).all()
    assert web.sent < len(web.files["/00.tar"]) / 2
    assert [path.suffix for path in cache.folder.iterdir()] == [".npz"]
    web.sent = 0
    assert len(open_index(source, ReadOptions(cache=cache))) == 7
    assert web.sent == 0
    web.version = 2
    assert len(open_index(source, ReadOptions(cache=cache))) == 7
    assert web.sent > 0


def test_images_are_measured_by_ranges(web, tmp_path):
    web.files["/a.tar"] = tar_bytes(
        [(f"{n}.{kind}", data) for n in range(4) for kind, data in
         (("png", picture(size=(40, 10 + n))), ("txt", b"x"))]
    )  # fmt: skip
    cache = ShardCache(tmp_path / "cache", gigabytes=1)
    index = open_index(web.url("/a.tar"), ReadOptions(min_size=12, cache=cache))
    assert [index.key(i) for i in range(len(index))] == ["2", "3"]
