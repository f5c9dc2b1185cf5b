"""The index of webshart next to a shard: x.json next to x.tar, as its 0.4.6 writes it."""

import io
import json
import random
import tarfile

import numpy as np
import pytest
from material import picture, samples, tar_bytes

from ldm.data.shards import remote
from ldm.data.shards.cache import ShardCache
from ldm.data.shards.index import ReadOptions, open_index
from ldm.data.shards.tar_headers import scan_shard
from ldm.data.shards.webshart_index import scan_webshart_index


def index_of(tar: bytes) -> dict:
    """What webshart writes: members in any order, with the parsed json of their sample."""
    files, records = {}, {}
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        for member in archive:
            files[member.name] = {"path": member.name, "offset": member.offset_data}
            files[member.name]["length"] = member.size
            if member.name.endswith(".json"):
                data = archive.extractfile(member).read()
                records[member.name] = (data, member)
    for name, one in files.items():
        record = f"{name.rpartition('.')[0]}.json"
        if not name.endswith(".json") and record in records:
            data, member = records[record]
            one |= {"json_path": record, "json_offset": member.offset_data}
            one |= {"json_length": member.size, "json_metadata": json.loads(data)}
    names = list(files)
    random.Random(0).shuffle(names)
    return {"path": "x.tar", "filesize": len(tar), "files": {name: files[name] for name in names}}


def members() -> list[tuple[str, bytes]]:
    found = []
    for n in range(4):
        record = json.dumps({"caption": f"the {n}th", "long": "text"} if n != 2 else {"n": 3})
        found += [(f"dir/{n}.png", picture(n)), (f"dir/{n}.json", record.encode())]
        found += [(f"dir/{n}.txt", f"text {n}".encode() if n != 3 else b"")]
    found += [("a.jpg", picture()), ("b.cls", b"1"), ("c.PNG", picture()), ("c.txt", b"caf\xe9")]
    return found


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes(members()))
    return path


def write_index(shard, change=lambda index: index) -> None:
    index = index_of(shard.read_bytes())
    shard.with_suffix(".json").write_text(json.dumps(change(index) or index))


def assert_same(one, other) -> None:
    assert one.keys == other.keys
    np.testing.assert_array_equal(one.members, other.members)
    assert one[2:5] == other[2:5]


def test_the_index_says_what_a_scan_finds(shard):
    assert scan_webshart_index(shard) is None
    write_index(shard)
    assert_same(scan_webshart_index(shard), scan_shard(shard))
    assert scan_shard(shard).skipped == {"no caption": 1, "no image": 1}


def test_a_caption_in_the_index_need_not_be_read(shard):
    write_index(shard, lambda index: index["files"]["c.PNG"].update(captions="read beforehand"))
    assert scan_shard(shard).captions.garbled == 1
    assert scan_webshart_index(shard).captions.garbled == 0


def drop_last(index: dict) -> None:
    index["files"].pop("c.txt")


def drop_middle(index: dict) -> None:
    index["files"].pop("dir/1.json")


def move(index: dict) -> None:
    index["files"]["dir/1.png"]["offset"] += 512


def swap(index: dict) -> None:
    one, other = index["files"]["dir/0.png"], index["files"]["c.PNG"]
    one["offset"], other["offset"] = other["offset"], one["offset"]


def other_size(index: dict) -> None:
    index["filesize"] += 512


@pytest.mark.parametrize("change", [drop_last, drop_middle, move, swap, other_size])
def test_an_index_of_another_shard_is_not_used(shard, change):
    write_index(shard, change)
    assert scan_webshart_index(shard) is None
    assert len(open_index(shard)) == 5


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"files": 3, "filesize": 1}', '{"filesize": 10240, "files": {"a": []}}'],
)
def test_another_json_file_is_ignored(shard, text):
    shard.with_suffix(".json").write_text(text)
    assert scan_webshart_index(shard) is None
    assert len(open_index(shard)) == 5


def test_names_and_members_that_the_index_cannot_have_lead_to_a_scan(tmp_path):
    image, link = picture(), tarfile.TarInfo("b.png")
    link.type, link.linkname = tarfile.SYMTYPE, "a.png"
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("a.png", "a.txt"):
            member = tarfile.TarInfo(name)
            member.size = len(image)
            tar.addfile(member, io.BytesIO(image))
        tar.addfile(link)
    (tmp_path / "x.tar").write_bytes(file.getvalue())
    write_index(tmp_path / "x.tar", lambda index: index["files"].pop("b.png") and None)
    assert scan_webshart_index(tmp_path / "x.tar") is None


def test_a_shard_on_a_server_needs_no_scan(web, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "RETRY_WAIT", 0.01)
    big = tar_bytes(
        [("0.png", bytes(2**20)), ("0.json", b'{"caption": "c"}'), *samples(9, first=1)]
    )
    web.files["/x.tar"] = big
    scanned = open_index(web.url("/x.tar"), options(tmp_path / "scanned"))
    web.files["/x.json"] = json.dumps(index_of(big)).encode()
    web.seen.clear()
    index = open_index(web.url("/x.tar"), options(tmp_path / "indexed"))
    assert index.fingerprint == scanned.fingerprint
    np.testing.assert_array_equal(index.members, scanned.members)
    assert next(name for method, name, _ in web.seen if method == "GET") == "/x.json"


def options(folder) -> ReadOptions:
    return ReadOptions(cache=ShardCache(folder, gigabytes=1))
