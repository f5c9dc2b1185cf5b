"""Data that was made to do harm, or was harmed, all the way to batches: what becomes of each."""

import gzip
import io
import multiprocessing
import os
import pickle
import resource
import struct
import tarfile
import time
import zlib
from itertools import islice

import numpy as np
import pytest
import torch
from batches import collate
from material import encoded, picture, samples, tar_bytes
from PIL import Image
from torch.utils.data import DataLoader

from ldm.data.dataset import TextImageDataset
from ldm.data.image_decoding import ImageError, read_image, read_image_size
from ldm.data.position_sampler import PositionBatchSampler, ShuffledOrder
from ldm.data.shards.index import open_index
from ldm.data.shards.reader import ShardReader
from ldm.data.shards.tar_headers import ShardError


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker) -> None:
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def write(folder, members: list[tuple[str, bytes]], name: str = "0.tar"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(tar_bytes(members))
    return folder


def epoch(folder, *, workers: int = 0, on_error: str = "stop", batch: int = 2) -> list[dict]:
    """The batches of an epoch, or a little more."""
    data = TextImageDataset(ShardReader(folder), size=8, seed=0, train=True, on_error=on_error)
    order = ShuffledOrder(data.shards.index.shard_sizes(), seed=0)
    batches = PositionBatchSampler(order, batch=batch, rank=0, world=1, start=lambda: 0)
    loader = DataLoader(data, batch_sampler=batches, num_workers=workers, collate_fn=collate)
    return list(islice(iter(loader), -(-len(data) // batch)))


def test_no_member_runs_anything(tmp_path):
    """Pickles under the names that some loader unpickles, and under those that are read."""
    marker = tmp_path / "marker"
    payload = pickle.dumps(Payload(marker))
    arrays = io.BytesIO()
    np.save(arrays, np.array([Payload(marker)], object), allow_pickle=True)
    zipped = io.BytesIO()
    torch.save(Payload(marker), zipped)
    kinds = {"pyd": payload, "pkl": payload, "pickle": payload, "pth": zipped.getvalue()}
    kinds |= {"pt": zipped.getvalue(), "npy": arrays.getvalue(), "npz": arrays.getvalue()}
    kinds |= {"py": b"open('marker', 'w')", "cls": payload, "mp": payload, "json.pkl": payload}
    members = []
    for n, (kind, data) in enumerate(kinds.items()):
        members += [(f"{n}.{kind}", data), (f"{n}.png", picture()), (f"{n}.txt", b"fine")]
    members += [("x.png", payload), ("x.txt", payload), ("x.json", payload)]
    pickle.loads(payload)
    assert marker.exists()  # it would work
    marker.unlink()
    batches = epoch(write(tmp_path / "in", members), workers=2, on_error="skip")
    assert not marker.exists()
    assert {text for batch in batches for text in batch["captions"]} == {"fine"}
    assert sum(len(batch["skipped"]) for batch in batches) == 1
    assert sorted(os.listdir(tmp_path)) == ["in"]
    assert sorted(os.listdir(tmp_path / "in")) == ["0.tar", "index.npz"]


def test_no_name_leads_outside(tmp_path):
    members, target = [], tmp_path / "secret.txt"
    target.write_text("secret")
    for n, name in enumerate(["../../x", "/etc/passwd", "a/../../b", "~/c", "$(d)", "e\nf", "g;h"]):
        members += [(f"{name}{n}.png", picture()), (f"{name}{n}.txt", b"%d" % n)]
    folder = write(tmp_path / "in", members)
    with tarfile.open(folder / "1.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            for name, data in (("l.png", picture()), ("l.txt", None)):
                member = tarfile.TarInfo(name)
                if data is None:
                    member.type, member.linkname = kind, str(target)
                    tar.addfile(member)
                else:
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    batches = epoch(folder)
    texts = [text for batch in batches for text in batch["captions"]]
    assert set(texts) == {str(n) for n in range(7)}
    assert sorted(os.listdir(tmp_path)) == ["in", "secret.txt"]


CAPTIONS = {
    "long": (b"x" * 100_000, "x" * 100_000),
    "no utf-8": (b"caf\xe9 \xff\xfe", "caf\ufffd \ufffd\ufffd"),
    "utf-16": ("\ufeffa".encode("utf-16"), None),
    "nul": (b"a\0b", "a b"),
    "empty": (b"", ""),
    "blank": (b" \n\t ", ""),
    "emoji": ("\U0001f468\u200d\U0001f469".encode(), "\U0001f468\u200d\U0001f469"),
    "right to left": ("\u202eשלום".encode(), "\u202eשלום"),
    "many lines": (b"a\nb\r\nc", "a b c"),
}  # fmt: skip


def test_every_caption_is_some_text(tmp_path):
    members = []
    for n, (raw, _) in enumerate(CAPTIONS.values()):
        members += [(f"{n:02}.png", picture()), (f"{n:02}.txt", raw)]
    odd = [
        b"[1]",
        b"{",
        b'{"caption": 3}',
        b'{"captions": [null, " ", {}]}',
        b"\xff",
        b"[" * 99_999,
    ]
    for n, raw in enumerate(odd):
        members += [(f"j{n}.png", picture()), (f"j{n}.json", raw), (f"j{n}.txt", b"the text")]
    batches = epoch(write(tmp_path / "in", members), workers=2)
    got = {k: t for batch in batches for k, t in zip(batch["key"], batch["captions"], strict=True)}
    assert len(got) == len(CAPTIONS) + len(odd)
    for n, (_, expected) in enumerate(CAPTIONS.values()):
        assert expected is None or got[f"{n:02}"] == expected
        got[f"{n:02}"].encode()
    assert {got[f"j{n}"] for n in range(len(odd))} == {"the text"}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_a_truncated_image_is_an_error_or_whole(format):
    """Never half a picture, with grey where the rest should be."""
    image = Image.linear_gradient("L").resize((24, 20)).convert("RGB")
    data = encoded(image, format)
    whole = read_image(data)
    refused = 0
    for cut in range(len(data)):
        try:
            assert read_image(data[:cut]) == whole
        except ImageError:
            refused += 1
    assert refused >= len(data) - 24


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: bytes) -> bytes:
    """One whole, black PNG."""
    rows = zlib.compressobj()
    body = b"".join(rows.compress(bytes(1 + width // 8 + 1)) for _ in range(height)) + rows.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", body), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


ZEROS = zlib.compress(bytes(300 * 2**20), 9)
BOMBS = {
    "12000 x 12000": png(12_000, 12_000),
    "zTXt": png(8, 8, chunk(b"zTXt", b"a\0\0" + ZEROS)),
    "iTXt": png(8, 8, chunk(b"iTXt", b"a\0\1\0\0\0" + ZEROS)),
    "iCCP": png(8, 8, chunk(b"iCCP", b"a\0\0" + ZEROS)),
    "BMP header": b"BM"
    + struct.pack("<IIIIiiHHIIiiII", 9**9, 0, 54, 40, 30_000, 30_000, 1, 24, 0, 0, 0, 0, 0, 0),
    "GIF canvas": b"GIF89a" 
    + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b",\0\0\0\0" + b"\xff" * 9,
}  # fmt: skip


def cost_of(action) -> tuple[str, float, float]:
    """What a fresh process says, the seconds it takes and the MiB that it adds."""

    def run(out) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begun = time.perf_counter()
        try:
            told = str(action())
        except (ImageError, ShardError) as error:
            told = f"refused: {error}"
        seconds = time.perf_counter() - begun
        out.put(
            (told, seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
        )

    context = multiprocessing.get_context("fork")
    out = context.SimpleQueue()
    process = context.Process(target=run, args=(out,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    return out.get()


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_cost_nothing(name):
    assert len(BOMBS[name]) < 400_000
    told, seconds, mib = cost_of(lambda: read_image(BOMBS[name]).size)
    assert told.startswith("refused") or (name == "iCCP" and told == "(8, 8)")
    assert seconds < 2
    assert mib < 200
    assert cost_of(lambda: read_image_size(BOMBS[name]))[2] < 200


def test_archives_that_blow_up_cost_nothing(tmp_path):
    (tmp_path / "gzip").mkdir()
    (tmp_path / "gzip" / "0.tar").write_bytes(gzip.compress(bytes(200 * 2**20)))
    (tmp_path / "hole").mkdir()
    with open(tmp_path / "hole" / "0.tar", "wb") as file:
        file.truncate(2**40)  # a tebibyte that is not there
    write(tmp_path / "many", [("a.png", picture()), *[("a.x", b"")] * 20_000, ("a.txt", b"a")])
    for name, expected in (("gzip", "gunzip"), ("hole", "bytes from the end mark"), ("many", "1")):
        told, seconds, mib = cost_of(lambda name=name: len(open_index(tmp_path / name)))
        assert told == expected if name == "many" else expected in told
        assert mib < 200
        assert seconds < 5


@pytest.mark.parametrize("how", ["renamed over", "written over", "longer", "cut"])
def test_a_shard_replaced_during_a_run_stops_it(tmp_path, how):
    """Also by one of the same size: its members may lie elsewhere. Skipping is for pictures."""
    folder = write(tmp_path / "in", samples(40))
    data = TextImageDataset(ShardReader(folder), size=8, seed=0, train=True, on_error="skip")
    assert data[0, 0]["key"] == "0000"
    path = folder / "0.tar"
    old = path.read_bytes()
    other = {"longer": tar_bytes(samples(41)), "cut": old[:5000]}.get(
        how, tar_bytes(samples(40, 40))
    )
    if how == "renamed over":
        (tmp_path / "new").write_bytes(other)
        os.replace(tmp_path / "new", path)
        assert data[1, 1]["key"] == "0001"  # who has it open keeps the old one
        data = pickle.loads(pickle.dumps(data))  # and a worker that opens it now is told
    else:
        path.write_bytes(other)
    with pytest.raises(ShardError, match=r"0\.tar changed since it was indexed; restart"):
        data[2, 2]
    assert len(open_index(folder)) == (41 if how == "longer" else 40) if how != "cut" else True


def test_a_shard_removed_during_a_run_is_named(tmp_path):
    folder = write(tmp_path / "in", samples(4))
    data = TextImageDataset(ShardReader(folder), size=8, seed=0, train=True)
    (folder / "0.tar").unlink()
    with pytest.raises(ShardError, match=r"0\.tar cannot be read: No such file"):
        data[0, 0]


@pytest.mark.parametrize(
    ("count", "workers", "batch"), [(1, 0, 4), (1, 3, 5), (3, 5, 8), (7, 2, 3)]
)
def test_few_samples_fill_any_batch(tmp_path, count, workers, batch):
    """Fewer than a batch, than workers: epochs follow one another inside it."""
    folder = write(tmp_path / "in", samples(count))
    keys = [key for part in epoch(folder, workers=workers, batch=batch) for key in part["key"]]
    assert len(keys) % batch == 0
    for first in range(0, len(keys) - count + 1, count):
        assert len(set(keys[first : first + count])) == count
