"""Shards of a data set on the hub: hf://datasets/ORGANISATION/NAME[@REVISION]/FILE."""

import sys

import pytest
from hub import REPO, TOKEN, serve_hub
from huggingface_hub import HfFileSystem
from material import samples, tar_bytes

from ldm.data.shards import remote
from ldm.data.shards.cache import ShardCache
from ldm.data.shards.index import ReadOptions, open_index
from ldm.data.shards.locations import locate_shards
from ldm.data.shards.reader import ShardReader
from ldm.data.shards.remote import RemoteError, UrlError, describe_urls, download_shard, read_range

ADDRESS = f"hf://datasets/{REPO}"
BIG = tar_bytes([("a.png", bytes(20 * 2**20)), *samples(1)])


@pytest.fixture
def hub(monkeypatch):
    server = serve_hub()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(remote, "RETRY_WAIT", 0.01)
    HfFileSystem.clear_instance_cache()
    yield server
    HfFileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()


def test_shards_are_named_by_range_glob_or_folder(hub):
    for number in range(3):
        hub.add(f"data/x-{number:02}.tar", tar_bytes(samples(2, first=2 * number)))
    names = [f"{ADDRESS}/data/x-{number:02}.tar" for number in range(3)]
    for source in ("/data/x-{00..02}.tar", "/data/x-*.tar", "/data"):
        assert [str(shard) for shard in locate_shards(ADDRESS + source)] == names


def test_samples_are_read_through_the_cache(hub, tmp_path):
    for number in range(2):
        hub.add(f"{number}.tar", tar_bytes(samples(2, first=2 * number)))
    options = ReadOptions(cache=ShardCache(tmp_path / "cache", gigabytes=1))
    shards = ShardReader(f"{ADDRESS}/{{0..1}}.tar", options)
    assert [shards.read(i).key for i in range(4)] == ["0000", "0001", "0002", "0003"]
    files = [name for _, name, span in hub.seen if span]
    hub.seen.clear()
    assert len(ShardReader(f"{ADDRESS}/{{0..1}}.tar", options)) == 4  # the index is in the cache
    assert files
    assert not [name for _, name, span in hub.seen if span]


def test_ranges_bring_no_more_than_is_read(hub):
    hub.add("big.tar", BIG)
    shard = describe_urls([f"{ADDRESS}/big.tar"])[0]
    assert read_range(shard, 512, 700) == BIG[512:700]
    assert hub.sent == 188


def test_a_revision_is_part_of_the_address(hub, tmp_path):
    hub.add("a.tar", tar_bytes(samples(1)), revision="v1.0")
    shard = describe_urls([f"{ADDRESS}@v1.0/a.tar"])[0]
    download_shard(shard, tmp_path / "part")
    assert (tmp_path / "part").stat().st_size == shard.size
    with pytest.raises(FileNotFoundError, match=r"no shard at hf://.*@v2.*404 RevisionNotFound"):
        describe_urls([f"{ADDRESS}@v2/a.tar"])


def test_a_file_replaced_meanwhile_is_an_error(hub, tmp_path):
    hub.add("a.tar", tar_bytes(samples(2)))
    shard = describe_urls([f"{ADDRESS}/a.tar"])[0]
    hub.add("a.tar", tar_bytes(samples(2, first=7)))
    with pytest.raises(RemoteError, match="was replaced on its server"):
        download_shard(shard, tmp_path / "part")


def test_a_private_data_set_needs_a_token(hub, monkeypatch):
    hub.add("a.tar", tar_bytes(samples(2)))
    hub.private = True
    for source in ("/a.tar", "/*.tar"):
        with pytest.raises(RemoteError, match=r"a?\.tar could not be read: HTTP 401.*HF_TOKEN"):
            locate_shards(ADDRESS + source)
    HfFileSystem.clear_instance_cache()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert [str(shard) for shard in locate_shards(f"{ADDRESS}/*.tar")] == [f"{ADDRESS}/a.tar"]


def test_the_environment_may_forbid_the_hub(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RemoteError, match=r"a\.tar could not be read: .*HF_HUB_OFFLINE is set"):
        locate_shards(f"{ADDRESS}/a.tar")


def test_without_its_package_the_hub_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    loaded = sys.modules["fsspec.registry"]._registry  # the package shows a view of it
    monkeypatch.delitem(loaded, "hf", raising=False)
    with pytest.raises(UrlError, match=r"needs a further package: pip install huggingface_hub"):
        locate_shards(f"{ADDRESS}/a.tar")


def test_what_is_not_there_is_named(hub):
    hub.add("a.tar", tar_bytes(samples(2)))
    for address in (f"{ADDRESS}/b.tar", "hf://datasets/team/other/a.tar"):
        with pytest.raises(FileNotFoundError, match=f"no shard at {address}"):
            describe_urls([address])
    with pytest.raises(FileNotFoundError, match=r"no \.tar shards at hf://.*/none/\*\.tar"):
        open_index(f"{ADDRESS}/none/*.tar")
    assert hub.sent == 0
