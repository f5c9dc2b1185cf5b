import hashlib
import io
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from material import encoded, picture
from PIL import Image
from tqdm import tqdm

from ldm.data.image_decoding import read_image
from ldm.data.prepare.image_files import ImageSettings, write_image_shards
from ldm.data.prepare.sources import read_coco_records, read_folder_records
from ldm.data.shards.reader import ShardReader


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "index.npz"}


def fields(shards: ShardReader, i: int) -> dict:
    shard, (offset, size) = shards.index.paths[shards.index.shard[i]], shards.index.locations(i)[2]
    return json.loads(shard.read_bytes()[offset : offset + size])


@pytest.fixture
def folder(tmp_path) -> Path:
    """Ten pictures, numbers 3, 6 and 7 of them broken."""
    folder = tmp_path / "images"
    folder.mkdir()
    for n in range(10):
        data = picture(n, (40, 20))
        (folder / f"{n}.png").write_bytes(data[:50] if n in (3, 6, 7) else data)
        (folder / f"{n}.txt").write_text(f"number {n}\nthe {n}th")
    return folder


def prepare(folder: Path, out: Path, **changed):
    workers = changed.pop("workers", 3)
    settings = ImageSettings(**{"size": 16, "samples_per_shard": 2, **changed})
    records = read_folder_records(folder)
    return write_image_shards(records, out, settings=settings, workers=workers)


def test_shards_of_a_folder(folder, tmp_path):
    report = prepare(folder, tmp_path / "out")
    assert (report.written, report.skipped) == (7, {"damaged PNG": ["3.png", "6.png", "7.png"]})
    assert json.loads((tmp_path / "out/report.json").read_text()) == {
        "written": 7,
        "skipped": report.skipped,
    }
    shards = ShardReader(tmp_path / "out")
    keys = [shards.index.key(i) for i in range(len(shards))]
    assert keys == [f"0000{n // 2}000{n % 2}" for n in (0, 1, 2, 4, 5, 8, 9)]
    assert shards.read(3).captions == ["number 4 the 4th"]
    assert read_image(shards.read(3).image).size == (32, 16)
    source = (folder / "4.png").read_bytes()
    assert fields(shards, 3) == {
        "key": "000020000", "status": "success", "file_name": "4.png",
        "caption": "number 4 the 4th", "captions": ["number 4 the 4th"],
        "width": 32, "height": 16, "original_width": 40, "original_height": 20,
        "sha256": hashlib.sha256(source).hexdigest(),
    }  # fmt: skip
    # Shard 3 would hold nothing but broken pictures: it has statistics and no archive.
    names = {f"0000{n}_stats.json" for n in range(5)} | {f"0000{n}.tar" for n in (0, 1, 2, 4)}
    assert set(contents(tmp_path / "out")) == names | {"prepare.json", "report.json"}


@pytest.mark.parametrize(
    "lost",
    [
        ["00004.tar"],
        ["00004_stats.json"],
        ["00001.tar", "00002_stats.json", "report.json", "index.npz"],
        ["00003_stats.json", "00004.tar", "00004_stats.json"],
    ],
)
def test_a_second_call_finishes_what_is_missing(folder, tmp_path, lost):
    whole = prepare(folder, tmp_path / "whole")
    prepare(folder, tmp_path / "out", workers=1)
    for name in lost:
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out/00004.tar.0a1b2c3d.tmp").write_bytes(b"half a shard")
    assert prepare(folder, tmp_path / "out") == whole
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(ShardReader(tmp_path / "out")) == 7


def test_finished_shards_are_not_written_again_and_damaged_ones_are(folder, tmp_path):
    out = tmp_path / "out"
    prepare(folder, out)
    before = contents(out)
    stamps = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    (out / "00001.tar").write_bytes(before["00001.tar"][:700])
    (out / "00002.tar").write_bytes(before["00001.tar"])  # whole, but one sample too few
    prepare(folder, out)
    assert contents(out) == before
    changed = {p.name for p in out.glob("*.tar") if p.stat().st_mtime_ns != stamps[p.name]}
    assert changed == {"00001.tar", "00002.tar"}


def test_kills_at_any_moment_change_nothing(folder, tmp_path):
    prepare(folder, tmp_path / "whole")
    out = tmp_path / "out"
    killed = 0
    for delay in range(20):
        pid = os.fork()
        if pid == 0:
            try:
                # tqdm's own lock is shared with forked children: killed with it, one would leave
                # its parent waiting for good.
                tqdm.set_lock(threading.RLock())
                prepare(folder, out)
            finally:
                os._exit(0)
        time.sleep(0.002 * delay)
        os.kill(pid, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    assert killed > 0
    prepare(folder, out)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_kill_before_the_first_file_leaves_nothing_for_good(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "prepare.json.0a1b2c3d.tmp").write_text("{")
    (out / "mine.tmp").write_text("kept")
    prepare(folder, out)
    assert {path.name for path in out.glob("*.tmp")} == {"mine.tmp"}


def test_other_settings_are_refused_by_name(folder, tmp_path):
    out = tmp_path / "out"
    prepare(folder, out)
    before = contents(out)
    with pytest.raises(ValueError, match=r"other settings \(size was 16, quality was 95\)"):
        prepare(folder, out, size=8, quality=50)
    (folder / "5.txt").write_text("another caption")
    with pytest.raises(ValueError, match=r"other settings \(records was [0-9a-f]+\)"):
        prepare(folder, out)
    assert contents(out) == before


def test_shards_from_elsewhere_are_not_mixed_in(folder, shard_folder):
    elsewhere = shard_folder(3)
    with pytest.raises(FileExistsError, match="came from elsewhere"):
        prepare(folder, elsewhere)
    assert [p.name for p in elsewhere.iterdir()] == ["00000.tar"]
    (elsewhere / "00000.tar").rename(elsewhere / "report.json")
    with pytest.raises(FileExistsError, match=r"report\.json came from elsewhere"):
        prepare(folder, elsewhere)


def test_old_statistics_without_reasons_are_valid(folder, tmp_path):
    prepare(folder, out := tmp_path / "out")
    for path in out.glob("*_stats.json"):
        stats = json.loads(path.read_text())
        path.write_text(json.dumps({**stats, "broken": list(stats["broken"])}))
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert prepare(folder, out).skipped == {"broken": ["3.png", "6.png", "7.png"]}
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}


def test_only_broken_images_are_an_error_that_names_the_report(folder, tmp_path):
    for path in folder.glob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"none of the 10 images .*report\.json"):
        prepare(folder, tmp_path / "out")
    (listed,) = json.loads((tmp_path / "out/report.json").read_text())["skipped"].values()
    assert len(listed) == 10


def test_refused_calls_leave_nothing_behind(folder, tmp_path):
    out = tmp_path / "out"
    wrong = [{"samples_per_shard": 10_001}, {"samples_per_shard": 0}, {"size": 0}, {"limit": 0},
             {"format": "gif"}, {"quality": 101}, {"workers": 0}]  # fmt: skip
    for change in wrong:
        with pytest.raises(ValueError, match=next(iter(change))):
            prepare(folder, out, **change)
    with pytest.raises(FileNotFoundError):
        prepare(tmp_path / "absent", out)
    with pytest.raises(FileNotFoundError):
        read_coco_records(folder, tmp_path / "absent.json")
    assert not out.exists()


def test_limit_takes_the_first_records(folder, tmp_path):
    report = prepare(folder, tmp_path / "out", limit=5)
    assert (report.written, report.skipped) == (4, {"damaged PNG": ["3.png"]})


@pytest.mark.parametrize("format", ["jpg", "png", "webp"])
def test_only_images_that_fit_are_copied(tmp_path, format):
    pillow = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[format]
    folder = tmp_path / "images"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    small, grey = Image.new("RGB", (30, 16), "red"), Image.new("L", (8, 8), 7)
    sources = {
        "0-fits": encoded(small, pillow),
        "1-large": encoded(Image.new("RGB", (40, 17), "red"), pillow),
        "2-turned": encoded(small, pillow, exif=exif),
        "3-other": encoded(grey, "PNG"),
    }
    for name, data in sources.items():
        (folder / f"{name}.{format}").write_bytes(data)
        (folder / f"{name}.txt").write_text(name)
    prepare(folder, tmp_path / "out", format=format)
    shards = ShardReader(tmp_path / "out")
    images = [shards.read(i).image for i in range(4)]
    assert [a == b for a, b in zip(images, sources.values(), strict=True)] == [1, 0, 0, 0]
    pictures = [Image.open(io.BytesIO(image)) for image in images]
    assert {(image.mode, image.format) for image in pictures} == {("RGB", pillow)}
    assert [image.size for image in pictures] == [(30, 16), (38, 16), (16, 30), (8, 8)]


def test_real_coco(real_data, tmp_path):
    coco = real_data("coco_mini")
    annotations = coco / "annotations/captions_val2017.json"
    records = read_coco_records(coco / "val2017", annotations)
    settings = ImageSettings(size=64, samples_per_shard=50)
    report = write_image_shards(records, tmp_path, settings=settings)
    assert (report.written, report.skipped) == (103, {})
    shards = ShardReader(tmp_path)
    assert shards.index.shard_sizes() == [50, 50, 3]
    grey = 0
    for i in range(103):
        sample = shards.read(i)
        image = read_image(sample.image)
        assert min(image.size) == 64
        assert len(sample.captions) == 5
        assert all(text == " ".join(text.split()) != "" for text in sample.captions)
        record = fields(shards, i)
        assert record["file_name"] == f"{record['image_id']:012}.jpg"
        assert record["url"].startswith("http")
        grey += Image.open(coco / "val2017" / record["file_name"]).mode == "L"
    assert grey == 1


def test_real_annotations_without_their_images(real_data, tmp_path):
    annotations = real_data("coco_captions_val2017") / "captions_val2017.json.gz"
    records = read_coco_records(real_data("coco_mini") / "val2017", annotations)
    report = write_image_shards(records, tmp_path, settings=ImageSettings(size=64, limit=10))
    assert report.written == 10
    assert {reason: len(names) for reason, names in report.skipped.items()} == {"missing": 4897}


def test_real_emoji(real_data, tmp_path):
    records = read_folder_records(real_data("emoji64"))
    report = write_image_shards(records, tmp_path, settings=ImageSettings(size=32))
    assert (report.written, report.skipped) == (459, {})
    sample = ShardReader(tmp_path).read(0)
    assert sample.captions == ["grinning face"]
    assert min(read_image(sample.image).getpixel((0, 0))) > 250  # transparent corners are white
