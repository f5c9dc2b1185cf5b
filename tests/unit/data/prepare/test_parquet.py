"""Parquet files as data sets on the Hugging Face hub have them."""

import json
import subprocess
import sys

import pytest
from material import picture
from test_prepare import contents, fields

from ldm.data.prepare.image_files import ImageSettings, write_image_shards
from ldm.data.prepare.parquet import read_parquet_records
from ldm.data.shards.reader import ShardReader
from ldm.utils.errors import UsageError

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def image(n: int) -> dict:
    return {"bytes": picture(n, (20, 10)), "path": f"{n}.png"}


@pytest.fixture
def folder(tmp_path):
    """Two files of four rows; row 1 has no bytes, row 2 no caption, and row 5 is broken."""
    images = [image(n) for n in range(8)]
    images[1]["bytes"] = None
    images[5]["bytes"] = images[5]["bytes"][:50]
    texts = [[f"number {n}", f"the {n}th"] if n != 2 else [] for n in range(8)]
    long = [f"a long text on {n}" for n in range(8)]
    (tmp_path / "data").mkdir()
    for number in range(2):
        rows = slice(4 * number, 4 * number + 4)
        columns = {"id": list(range(8))[rows], "image": images[rows], "captions": texts[rows]}
        table = pa.table(columns | {"long": long[rows]})
        path = tmp_path / f"data/train-{number}.parquet"
        parquet.write_table(table, path, row_group_size=2)
    return tmp_path / "data"


def prepare(folder, out, *, workers=2, **keys):
    settings = ImageSettings(size=8, samples_per_shard=3, format="png")
    records = read_parquet_records(f"{folder}/train-*.parquet", **keys)
    return write_image_shards(records, out, settings=settings, workers=workers)


def test_shards_of_parquet_files(folder, tmp_path):
    report = prepare(folder, tmp_path / "out")
    assert report.written == 5
    assert report.skipped == {
        "no caption": ["train-0.parquet#2"],
        "no image bytes": ["train-0.parquet#1"],
        "damaged PNG": ["train-1.parquet#1"],
    }
    shards = ShardReader(tmp_path / "out")
    assert [shards.read(i).captions[0][-1] for i in range(5)] == ["0", "3", "4", "6", "7"]
    assert shards.read(1).captions == ["number 3", "the 3th"]
    found = fields(shards, 1)
    assert (found["file_name"], found["long"]) == ("train-0.parquet#3", "a long text on 3")
    assert "id" not in found


def test_the_same_command_writes_the_same_bytes(folder, tmp_path):
    prepare(folder, tmp_path / "one", workers=1)
    prepare(folder, tmp_path / "two", workers=4)
    prepare(folder, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    with pytest.raises(ValueError, match="started with other settings"):
        prepare(folder, tmp_path / "two", caption_key="long")


def test_columns_are_guessed_or_named_or_refused_with_the_list(tmp_path):
    columns = {"jpeg": [picture(1)], "alt": ["one"], "alt2": ["two"], "width": [3]}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    listed = r"its columns: jpeg \(binary\), alt \(string\), alt2 \(string\), width \(int64\)"
    for named, message in (
        ({}, "which column has texts.* caption_key="),
        ({"caption_key": "width"}, "caption_key=width is no column of texts.* caption_key="),
        ({"image_key": "alt"}, "image_key=alt is no column of encoded images.* image_key="),
    ):
        with pytest.raises(UsageError, match=f"a.parquet: {message}.*{listed}"):
            read_parquet_records(str(tmp_path), **named)
    [record] = read_parquet_records(str(tmp_path), caption_key="alt2").usable
    assert (record.read(), record.captions) == (picture(1), ["two"])
    assert record.fields == {"alt": "one"}


def test_parts_share_out_the_rows(folder):
    table = pa.table({"image": [image(1)] * 50, "text": ["one"] * 50})
    parquet.write_table(table, folder / "x.parquet")
    names = [
        [record.file_name for record in read_parquet_records(f"{folder}/x*", part=part).usable]
        for part in ("all", "train", "val")
    ]
    assert sorted(names[1] + names[2]) == sorted(names[0])
    assert len(names[0]) == 50
    assert 1 <= len(names[2]) <= 10


def test_other_files_are_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1, or not")
    with pytest.raises(ValueError, match=r"a\.parquet is no intact Parquet file"):
        read_parquet_records(str(tmp_path / "*.parquet"))
    with pytest.raises(FileNotFoundError, match=r"no image in .*/b\* \(Parquet files\)"):
        read_parquet_records(str(tmp_path / "b*"))


def test_the_command_prepares_parquet_files(folder, tmp_path):
    command = [sys.executable, "-m", "ldm.prepare", "parquet", f"images={folder}", "size=8"]
    done = subprocess.run([*command, "out=out"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "5 samples in out; skipped: 1 no caption, 1 no image bytes, 1 damaged PNG" in done.stdout
    assert json.loads((tmp_path / "out/report.json").read_text())["written"] == 5


def test_without_pyarrow_the_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match="pip install pyarrow"):
        read_parquet_records(str(folder))
