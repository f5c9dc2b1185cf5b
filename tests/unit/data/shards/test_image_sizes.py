"""The sizes of images in the index: by webshart's index, else by the image's header."""

import json

import numpy as np
import pytest
from material import encoded, picture, samples, tar_bytes
from PIL import Image
from test_webshart_index import index_of

from ldm.data.image_decoding import read_image, read_image_size
from ldm.data.shards import parallel_scan
from ldm.data.shards.index import ReadOptions, open_index

MEASURED = ReadOptions(measure=True)


def turned(value: int, format: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return encoded(Image.new("RGB", (20, 12)), format, exif=exif.tobytes())


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("value", range(1, 9))
def test_sizes_are_those_of_the_upright_image(value, format):
    data = turned(value, format)
    assert read_image_size(data) == read_image(data).size


def test_the_header_of_a_large_image_is_enough():
    noise = np.random.default_rng(0).integers(0, 256, (300, 200, 3), np.uint8)
    assert read_image_size(encoded(Image.fromarray(noise), "PNG")[:5000]) == (200, 300)


def write(folder, *sizes: tuple[int, int]):
    folder.mkdir()
    members = []
    for n, size in enumerate(sizes):
        members += [(f"{n}.png", picture(size=size)), (f"{n}.txt", b"text")]
    (folder / "0.tar").write_bytes(tar_bytes(members))
    return folder


def test_an_index_is_measured_where_sizes_are_needed(tmp_path):
    folder = write(tmp_path / "in", (8, 6), (5, 9))
    assert open_index(folder).sizes is None
    assert open_index(folder, MEASURED).sizes.tolist() == [[8, 6], [5, 9]]
    assert open_index(folder).sizes.dtype == np.int32
    assert open_index(folder, ReadOptions(min_size=6)).sizes.tolist() == [[8, 6]]


def test_an_index_of_before_with_short_sides_is_measured_again(tmp_path):
    folder = write(tmp_path / "in", (8, 6), (5, 9))
    open_index(folder)
    with np.load(folder / "index.npz") as file:
        before = dict(file)
    np.savez(folder / "index.npz", **before, short=np.array([6, 5], np.int32))
    assert len(open_index(folder)) == 2
    assert open_index(folder, ReadOptions(min_size=6)).sizes.tolist() == [[8, 6]]
    assert open_index(folder, MEASURED).sizes.tolist() == [[8, 6], [5, 9]]


def test_sizes_of_webshart_need_no_header(tmp_path, monkeypatch):
    folder = write(tmp_path / "in", (8, 6), (5, 9), (7, 7))
    (folder / "1.tar").write_bytes(tar_bytes(samples(2)))
    index = index_of((folder / "0.tar").read_bytes())
    index["files"]["0.png"] |= {"width": 800, "height": 600, "aspect": 4 / 3}
    index["files"]["1.png"] |= {"width": 0, "height": "9"}
    index["files"]["2.png"] |= {"width": 2**40, "height": True}
    (folder / "0.json").write_text(json.dumps(index))
    assert open_index(folder).sizes[:2].tolist() == [[800, 600], [-1, -1]]
    read = []
    measure = parallel_scan._measure_image
    monkeypatch.setattr(
        parallel_scan, "_measure_image", lambda *at: read.append(at) or measure(*at)
    )
    sizes = [[800, 600], [5, 9], [7, 7], [8, 6], [8, 6]]
    assert open_index(folder, MEASURED).sizes.tolist() == sizes
    assert len(read) == 4, "all but that of the index"
    assert open_index(folder, MEASURED).sizes.tolist() == sizes
    assert len(read) == 4, "saved"
