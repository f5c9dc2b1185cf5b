import gzip
import json

import pytest
from material import picture

from ldm.data.prepare.sources import list_image_files, read_coco_records, read_folder_records


def coco(*images: dict, captions: dict) -> dict:
    notes = [
        {"id": n, "image_id": image_id, "caption": caption}
        for n, (image_id, texts) in enumerate(captions.items())
        for caption in texts
    ]
    return {"images": list(images), "annotations": notes}


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.jpg", "b.png", "sub/c.JPEG", "notes.md"):
        (folder / name).write_bytes(picture())
    (tmp_path / "secret.jpg").write_bytes(picture())
    return folder


def test_coco_records_and_skipped_images(images, tmp_path):
    names = ["b.png", "absent.jpg", "../secret.jpg", "/etc/passwd", "a.jpg", "n\0.jpg", "x" * 5000]
    rows = [{"id": n, "file_name": name} for n, name in enumerate(names)]
    rows[0] |= {"flickr_url": "http://f/b", "coco_url": "http://c/b"}
    captions = {n: ["  one\n", "two  words", " "] for n in range(len(names)) if n != 4}
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(coco(*rows, captions=captions)))
    records = read_coco_records(images, path)
    (found,) = records.usable
    assert (found.read(), found.file_name) == (picture(), "b.png")
    assert found.captions == ["one", "two words"]
    assert found.fields == {"image_id": 0, "url": "http://f/b"}
    assert records.skipped == {
        "missing": ["absent.jpg", "n\0.jpg", "x" * 5000],
        "unsafe name": ["../secret.jpg", "/etc/passwd"],
        "no caption": ["a.jpg"],
    }


INSTANCES = {
    "images": [{"id": 1, "file_name": "a.jpg"}],
    "annotations": [{"id": 1, "image_id": 1, "bbox": [0, 0, 1, 1], "category_id": 1}],
}


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(INSTANCES).encode(),
        json.dumps({**INSTANCES, "annotations": []}).encode(),
        json.dumps({**INSTANCES, "images": [{"id": 1}]}).encode(),
        b"[]",
        b'"text"',
        b"{broken",
        b"\xff\xfe",
        b"",
        b"[" * 100_000,
        gzip.compress(b"{}", mtime=0),
    ],
)
def test_a_file_that_holds_no_coco_captions_is_named(images, tmp_path, content):
    path = tmp_path / "annotations.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"annotations\.json is no (COCO captions|JSON) file"):
        read_coco_records(images, path)


def test_a_damaged_gzip_is_named(images, tmp_path):
    whole = gzip.compress(json.dumps(coco({"id": 1, "file_name": "a.jpg"}, captions={})).encode())
    for data in (whole[:20], b"{}", whole[:30] + b"xxxx" + whole[34:]):
        path = tmp_path / "captions.json.gz"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"captions\.json\.gz is no JSON file"):
            read_coco_records(images, path)


def test_missing_files_are_named(images, tmp_path):
    path = tmp_path / "captions.json"
    with pytest.raises(FileNotFoundError, match=r"image folder not found: .*absent"):
        read_coco_records(tmp_path / "absent", path)
    with pytest.raises(FileNotFoundError, match=r"annotation file not found: .*captions\.json"):
        read_coco_records(images, path)
    path.write_text(json.dumps(coco({"id": 1, "file_name": "zzz.jpg"}, captions={1: ["a"]})))
    with pytest.raises(FileNotFoundError, match=r"no image in .*images .*'missing': 1"):
        read_coco_records(images, path)


def test_a_folder_with_a_text_file_for_each_image(images):
    """All lines are one caption, as in a shard; UTF-16 is read by its mark, Latin-1 is named."""
    (images / "a.txt").write_bytes(b" first \r\n\r\nsecond\r\n")
    (images / "sub" / "c.txt").write_bytes("café\r\n".encode("utf-16"))
    for name, text in {"latin": b"caf\xe9\n", "unmarked": "wide".encode("utf-16-le")}.items():
        (images / f"{name}.jpg").write_bytes(picture())
        (images / f"{name}.txt").write_bytes(text)
    records = read_folder_records(images)
    assert [(r.file_name, r.captions) for r in records.usable] == [
        ("a.jpg", ["first second"]),
        ("sub/c.JPEG", ["café"]),
    ]
    assert records.skipped == {
        "no caption": ["b.png"],
        "caption neither in UTF-8 nor in UTF-16 with a byte order mark": [
            "latin.jpg",
            "unmarked.jpg",
        ],
    }


def captioned(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture())
    path.with_suffix(".txt").write_text("x")


def test_linked_folders_are_read_once(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for path in (root / "real/a.jpg", elsewhere / "deep/b.jpg", tmp_path / "beside.jpg"):
        captioned(path)
    (root / "0-real").symlink_to("real")  # what lies there keeps its name
    (root / "set").symlink_to(elsewhere)
    (root / "again").symlink_to(elsewhere / "deep")
    (root / "parent").symlink_to("..")
    (elsewhere / "back").symlink_to(root)
    (elsewhere / "self").symlink_to(".")
    (root / "nowhere").symlink_to("absent")
    records = read_folder_records(root)
    assert [record.file_name for record in records.usable] == ["again/b.jpg", "real/a.jpg"]
    assert records.skipped == {}


def test_hidden_files_and_unsupported_formats_are_counted(tmp_path):
    names = ("ok.jpg", "._ok.jpg", ".ipynb_checkpoints/ok.jpg", "__MACOSX/a/._ok.jpg")
    for name in (*names, "a.avif", "sub/b.AVIF", "c.tiff", "d.md"):
        captioned(tmp_path / name)
    records = read_folder_records(tmp_path)
    assert [record.file_name for record in records.usable] == ["ok.jpg"]
    assert {reason: sorted(names) for reason, names in records.skipped.items()} == {
        "hidden": sorted(names[1:]),
        "in avif, which is not read": ["a.avif", "sub/b.AVIF"],
        "in tiff, which is not read": ["c.tiff"],
    }
    (tmp_path / "ok.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"in avif, which is not read': 2.*convert to"):
        read_folder_records(tmp_path)
    assert [path.name for path in list_image_files(tmp_path)] == []


def test_a_column_of_another_name_holds_the_captions(images):
    (images / "metadata.jsonl").write_text('{"file_name": "a.jpg", "prompt": "one"}')
    with pytest.raises(FileNotFoundError, match="with a 'text'"):
        read_folder_records(images)
    assert read_folder_records(images, caption_key="prompt").usable[0].captions == ["one"]


def test_a_folder_with_metadata(images):
    rows = [
        {"file_name": "sub/c.JPEG", "text": ["one", " two "], "extra": 1},
        {"file_name": "a.jpg", "text": "three"},
        {"file_name": "b.png"},
        {"file_name": "../secret.jpg", "text": "four"},
    ]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (images / "metadata.jsonl").write_text("\ufeff" + lines + "\n\n")
    records = read_folder_records(images)
    assert [(r.file_name, r.captions) for r in records.usable] == [
        ("sub/c.JPEG", ["one", "two"]),
        ("a.jpg", ["three"]),
    ]
    assert records.skipped == {"no caption": ["b.png"], "unsafe name": ["../secret.jpg"]}


@pytest.mark.parametrize("line", ["{broken", "[1]", "3", '"text"', '{"text": "no name"}'])
def test_a_bad_line_of_metadata_is_named(images, line):
    (images / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "t"}\n' + line)
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 2"):
        read_folder_records(images)


def test_a_folder_without_captioned_images_is_named(images, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no image in .*images .*'no caption': 3"):
        read_folder_records(images)
    with pytest.raises(FileNotFoundError, match="image folder not found"):
        read_folder_records(tmp_path / "absent")


def test_parts_of_a_folder(tmp_path):
    rows = [{"file_name": f"{n}.png", "text": "x"} for n in range(200)]
    for row in rows:
        (tmp_path / row["file_name"]).write_bytes(b"")

    def names(part: str) -> list[str]:
        return [record.file_name for record in read_folder_records(tmp_path, part=part).usable]

    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train, val = names("train"), names("val")
    assert sorted(train + val) == sorted(names("all"))
    assert 10 <= len(val) <= 30
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows[::-1][:150])))
    assert set(names("val")) <= set(val)  # a picture's part does not depend on the others
    with pytest.raises(ValueError, match="part must be all, train, val, got 'test'"):
        names("test")
