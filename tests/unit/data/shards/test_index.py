import gzip
import io
import pickle
import tarfile
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from material import picture, samples, tar_bytes

from ldm.config.training_checks import check_captions_readable
from ldm.data.datamodule import TextImageData
from ldm.data.image_decoding import MAX_IMAGE_BYTES
from ldm.data.shards.index import ReadOptions, ShardIndex, open_index
from ldm.data.shards.tar_headers import MAX_TEXT_BYTES, ShardError, scan_shard
from ldm.models.text.labels import NullTextEncoder
from ldm.utils.errors import UsageError

GOOD = tar_bytes(samples(3))


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = size, kind, link
    return member.tobuf(tarfile.GNU_FORMAT)


def pax(records: bytes) -> bytes:
    return header("pax", len(records), tarfile.XHDTYPE) + records.ljust(512, b"\0")


def write(tmp_path, data: bytes):
    path = tmp_path / "00000.tar"
    path.write_bytes(data)
    return path


DAMAGED = {
    "empty": b"",
    "zero block only": bytes(512),
    "cut in a header": GOOD[: 2 * 512 + 100],
    "cut in an image": GOOD[: 512 + 30],
    "cut in padding": GOOD[: 2 * 512 - 10],
    "cut after a member": GOOD[: 2 * 512],
    "no end blocks": GOOD.rstrip(b"\0") + bytes(-len(GOOD.rstrip(b"\0")) % 512),
    "one end block": GOOD[: 12 * 512 + 512],
    "random": np.random.default_rng(0).bytes(5000),
    "text": b"<html>404 not found</html>" * 100,
    "wrong checksum": GOOD[:4] + b"x" + GOOD[5:],
    "wrong checksum later": GOOD[: 2 * 512] + b"x" + GOOD[2 * 512 + 1 :],
    "gzip": gzip.compress(GOOD),
    "two joined": GOOD + GOOD,
    "member of 2^60 bytes": header("a.png", 2**60) + GOOD,
    "member of -512 bytes": header("a.png", -512) + GOOD,
    "long name of 2^60 bytes": header("a.png", 2**60, tarfile.GNUTYPE_LONGNAME) + GOOD,
    "pax header of 2^60 bytes": header("a.png", 2**60, tarfile.XHDTYPE) + GOOD,
    "pax size of 2^70 bytes": pax(b"31 size=1180591620717411303424\n") + header("a.png") + GOOD,
    "sparse": pax(b"22 GNU.sparse.major=0\n22 GNU.sparse.minor=1\n")
    + header("a.png", 8, tarfile.GNUTYPE_SPARSE)
    + GOOD,
    "endless pax headers": pax(b"") * 3000 + GOOD,
}


def test_the_archive_to_damage_is_whole(tmp_path):
    assert len(GOOD) >= 14 * 512
    assert scan_shard(write(tmp_path, GOOD))[0] == [b"0000", b"0001", b"0002"]


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_shards_are_named(tmp_path, name):
    path = write(tmp_path, DAMAGED[name])
    begun = time.perf_counter()
    with pytest.raises(ShardError, match="fetch or write it again") as error:
        open_index(tmp_path)
    assert str(path) in str(error.value)
    assert time.perf_counter() - begun < 1
    assert [p.name for p in tmp_path.iterdir()] == ["00000.tar"]


def test_a_gzip_file_gets_the_remedy(tmp_path):
    with pytest.raises(ShardError, match="gunzip"):
        open_index(write(tmp_path, DAMAGED["gzip"]))


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_every_truncated_shard_is_an_error(tmp_path, data):
    cut = data.draw(st.integers(0, 13 * 512 - 1))
    with pytest.raises(ShardError):
        scan_shard(write(tmp_path, GOOD[:cut]))


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_damage_to_headers_is_an_error_or_harmless(tmp_path, data):
    damaged = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        block = data.draw(st.sampled_from([0, 2, 4, 6, 8, 10])) * 512
        damaged[block + data.draw(st.integers(0, 511))] ^= data.draw(st.integers(1, 255))
    try:
        keys, rows, *_ = scan_shard(write(tmp_path, bytes(damaged)))
    except ShardError:
        return
    assert len(keys) == len(rows) <= 3


def test_missing_folder_or_shard_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "empty", []):
        with pytest.raises(FileNotFoundError, match=r"no \.tar shards"):
            open_index(source)
    for source in (tmp_path / "absent", [tmp_path / "absent"]):
        with pytest.raises(FileNotFoundError, match="absent"):
            open_index(source)


def left_out(tmp_path, members) -> tuple[list[str], dict[str, int]]:
    keys, _, skipped, *_ = scan_shard(write(tmp_path, tar_bytes(members)))
    return [key.decode() for key in keys], dict(skipped)


def test_unusable_samples_are_counted_and_others_stay(tmp_path):
    image = picture()
    members = [
        ("a.png", image), ("a.txt", b"a"),
        ("b.png", image),
        ("c.txt", b"c"),
        ("d.jpg", image), ("d.png", image), ("d.txt", b"d"),
        ("a.webp", image), ("a.json", b"{}"),
        ("e.png", image), ("e.txt", bytes(MAX_TEXT_BYTES + 1)),
        ("f.png", bytes(MAX_IMAGE_BYTES + 1)), ("f.txt", b"f"),
        ("g.cls", b"1"), ("g.PNG", image), ("g.pickle", b"x"), ("g.JSON", b"{}"),
        ("h.png", image), ("h.seg.png", image), ("h.txt", b"h"),
    ]  # fmt: skip
    assert left_out(tmp_path, members) == (
        ["a", "g", "h"],
        {
            "no caption": 1,
            "no image": 1,
            "more than one image": 1,
            "key seen before in its shard": 1,
            "txt over 1 MB": 1,
            "image over 32 MB": 1,
        },
    )


def test_member_names_are_keys_only(tmp_path):
    long = "deep/" * 800 + "name"
    names = ["../../x", "/etc/passwd", "dir.with.dot/a", "caf\udce9", long, "寿司"]
    members = []
    for name in names:
        members += [(name + ".png", picture()), (name + ".txt", b"t")]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "0.tar").write_bytes(file.getvalue())
    index = open_index(folder)
    expected = [name.replace("\udce9", "\ufffd") for name in names]
    assert [index.key(i) for i in range(len(index))] == expected
    assert sorted(p.name for p in folder.iterdir()) == ["0.tar", "index.npz"]
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_links_and_devices_are_no_members(tmp_path):
    blocks = b""
    for number, kind in enumerate([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE]):
        blocks += header(f"{number}.png", 0, kind, "/etc/passwd")
        blocks += header(f"{number}.txt", 1) + b"x".ljust(512, b"\0")
    keys, _, skipped, *_ = scan_shard(write(tmp_path, blocks + GOOD))
    assert keys == [b"0000", b"0001", b"0002"]
    assert skipped == {"no image": 3}


def sparse_txt(kind: str) -> bytes:
    """The member a.txt, 8 bytes long of which the last 4 are stored, in a form of GNU's."""
    blocks = b"tail".ljust(512, b"\0")
    old = bytearray(header("a.txt", 4, tarfile.GNUTYPE_SPARSE))
    old[386:410], old[483:495] = b"%011o\0%011o\0" % (4, 4), b"%011o\0" % 8
    old[148:156] = b" " * 8
    old[148:156] = b"%06o\0 " % sum(old)
    records = {
        "pax 0.0": b"GNU.sparse.size=8 GNU.sparse.numblocks=1 GNU.sparse.offset=4 "
        b"GNU.sparse.numbytes=4",
        "pax 0.1": b"GNU.sparse.size=8 GNU.sparse.numblocks=1 GNU.sparse.map=4,4 "
        b"GNU.sparse.name=a.txt",
        "pax 1.0": b"GNU.sparse.major=1 GNU.sparse.minor=0 GNU.sparse.name=a.txt "
        b"GNU.sparse.realsize=8",
    }
    if kind == "old":
        return bytes(old) + blocks
    lines = b"".join(b"%d %s\n" % (len(one) + 4, one) for one in records[kind].split())
    if kind == "pax 1.0":
        return pax(lines) + header("a.txt", 516) + b"1\n4\n4\n".ljust(512, b"\0") + blocks
    return pax(lines) + header("a.txt", 4) + blocks


@pytest.mark.parametrize("kind", ["old", "pax 0.0", "pax 0.1", "pax 1.0"])
def test_sparse_members_are_refused_by_name_or_left_out(tmp_path, kind):
    image = tar_bytes([("a.png", picture())])[: 2 * 512]
    path = write(tmp_path, image + sparse_txt(kind) + GOOD)
    with tarfile.open(path) as tar:  # it is intact
        assert tar.extractfile("a.txt").read() == bytes(4) + b"tail"
    for _ in ("built", "loaded"):
        with pytest.raises(ShardError, match=r"'a\.txt' is a sparse member.*without -S"):
            open_index(tmp_path)
        index = open_index(tmp_path, ReadOptions(on_error="skip"))
        assert [index.key(i) for i in range(len(index))] == ["0000", "0001", "0002"]
        assert index.skipped == {"sparse member": 1}


def test_empty_captions_give_a_warning_with_the_key_that_has_text(tmp_path, caplog):
    members = [("a.png", picture()), ("a.json", b'{"text": "a dog"}')]
    write(tmp_path, tar_bytes([*members, *samples(1)]))
    for _ in ("built", "loaded"):
        caplog.clear()
        open_index(tmp_path)
        assert "1 of 2 samples have an empty caption" in caplog.text
        assert "data.caption_key=text" in caplog.text
        caplog.clear()
        open_index(tmp_path, ReadOptions(caption_key="text"))
        assert "1 of 2 samples have an empty caption (read: text)" in caplog.text
        with pytest.raises(ShardError, match=r"caption_key=typo: 2 of 2 .*data\.caption_key=text"):
            open_index(tmp_path, ReadOptions(caption_key="typo"))


def test_another_caption_key_changes_the_fingerprint(tmp_path):
    members = [("a.png", picture()), ("a.json", b'{"text": "a dog", "caption": "a cat"}')]
    write(tmp_path, tar_bytes(members))
    with pytest.raises(ValueError, match="caption_key is a name or null, got 3"):
        ReadOptions(caption_key=3)
    prints = {
        open_index(tmp_path, ReadOptions(caption_key=key)).fingerprint for key in (None, "text")
    }
    assert len(prints) == 2


def test_no_usable_sample_is_an_error_that_counts(tmp_path):
    write(tmp_path, tar_bytes([("a.png", picture()), ("b.png", picture())]))
    with pytest.raises(ShardError, match="'no caption': 2"):
        open_index(tmp_path)


def arrays(index: ShardIndex) -> tuple:
    parts = (index.shard, index.members, index.key_bytes, index.key_ends)
    told = index.paths, index.stamps, index.skipped, index.captions, index.sparse
    return *told, [part.tolist() for part in parts]


def test_the_saved_index_is_used(shard_folder):
    folder = shard_folder(3, 2)
    built = open_index(folder)
    stamp = (folder / "index.npz").stat().st_mtime_ns
    assert arrays(open_index(folder)) == arrays(built)
    assert (folder / "index.npz").stat().st_mtime_ns == stamp
    assert built.shard_sizes() == [3, 2]


def test_the_saved_index_follows_the_shards(shard_folder):
    folder = shard_folder(3, 2)
    assert len(open_index(folder)) == 5
    (folder / "00002.tar").write_bytes(tar_bytes(samples(4, first=5)))
    assert len(open_index(folder)) == 9
    (folder / "00000.tar").write_bytes(tar_bytes(samples(1)))
    assert len(open_index(folder)) == 7
    (folder / "00001.tar").unlink()
    assert open_index(folder).shard_sizes() == [1, 4]


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_a_foreign_index_is_replaced_and_runs_nothing(shard_folder, tmp_path):
    folder, marker = shard_folder(2), tmp_path / "marker"
    open_index(folder)
    whole = (folder / "index.npz").read_bytes()
    objects = io.BytesIO()
    np.savez(objects, meta=np.array([Payload(marker)], object))
    lists = io.BytesIO()
    np.savez(lists, meta=np.array("[1, 2]"))
    bad = [b"", b"text", whole[:200], objects.getvalue(), lists.getvalue()]
    for data in [*bad, pickle.dumps(Payload(marker))]:
        (folder / "index.npz").write_bytes(data)
        marker.unlink(missing_ok=True)
        assert len(open_index(folder)) == 2
        assert not marker.exists()
        with np.load(folder / "index.npz") as saved:
            assert len(saved["shard"]) == 2


def test_an_index_with_a_flipped_bit_is_built_again(shard_folder):
    folder = shard_folder(3, 2)
    whole, home = arrays(open_index(folder)), folder / "index.npz"
    data = home.read_bytes()
    for i in range(0, len(data), 31):
        home.write_bytes(data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1 :])
        assert arrays(open_index(folder)) == whole, i


def test_where_it_cannot_be_saved_the_index_stays_in_memory(shard_folder):
    folder = shard_folder(2)
    (folder / "index.npz").mkdir()
    assert len(open_index(folder)) == 2
    assert sorted(p.name for p in folder.iterdir()) == ["00000.tar", "index.npz"]


def test_a_list_of_shards_keeps_its_order_and_writes_nothing(shard_folder):
    folder = shard_folder(3, 2)
    index = open_index([folder / "00001.tar", str(folder / "00000.tar")])
    assert [index.key(i) for i in range(5)] == ["0003", "0004", "0000", "0001", "0002"]
    assert not (folder / "index.npz").exists()


def test_a_list_may_contain_folders_twice(shard_folder):
    folder = shard_folder(2, 1)
    once = open_index(folder)
    index = open_index([folder, once.paths[0], folder])
    assert index.paths == [*once.paths, once.paths[0], *once.paths]
    assert index.shard_sizes() == once.shard_sizes() + once.shard_sizes()[:1] + once.shard_sizes()
    assert index.key(len(index) - 1) == once.key(len(once) - 1)


def test_many_shards_are_scanned_side_by_side(shard_folder):
    folder = shard_folder(*[n % 3 for n in range(40)])
    index = open_index(folder)
    assert index.shard_sizes() == [n % 3 for n in range(40)]
    assert [index.key(i) for i in range(len(index))] == [f"{i:04}" for i in range(39)]
    (folder / "00017.tar").write_bytes(GOOD[:1000])
    with pytest.raises(ShardError, match=r"00017\.tar is no intact tar archive"):
        open_index(folder)


def test_training_on_captions_needs_at_least_one_caption(tmp_path):
    write(tmp_path, tar_bytes([("a.png", picture()), ("a.json", b'{"text": "a dog"}')]))
    how = {"train": str(tmp_path), "val": str(tmp_path), "size": 8, "batch_size": 1}
    data = TextImageData(**how)
    encoder = torch.nn.Identity()
    encoder.names, encoder.width, encoder.pooled_width = None, 8, None
    with pytest.raises(UsageError, match=r"1 of 1 samples .*caption_key=text.*text_encoder=none"):
        check_captions_readable(encoder, data)
    check_captions_readable(NullTextEncoder(), data)
    check_captions_readable(encoder, TextImageData(**how, caption_key="text"))


def test_a_foreign_npz_file_is_not_replaced(tmp_path, caplog):
    folder, mine = tmp_path / "set", np.arange(5)
    folder.mkdir()
    (folder / "00000.tar").write_bytes(GOOD)
    np.savez(folder / "index.npz", features=mine)
    assert len(open_index(folder)) == 3
    assert np.array_equal(np.load(folder / "index.npz")["features"], mine)
    assert "index.npz is no index of ldm and stays" in caplog.text
