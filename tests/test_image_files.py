"""Pictures out of tensors, and PNG files that carry what made them."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.images import save_png, tile, to_pil, to_uint8

WHITE = (255, 255, 255)


def grey(value: int, *, height: int = 4, width: int = 6) -> torch.Tensor:
    """An image whose bytes are all `value`."""
    return torch.full((3, height, width), value / 127.5 - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_byte_survives(dtype):
    values = torch.arange(256, dtype=torch.uint8)
    images = (values.to(dtype) / 127.5 - 1).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert (to_uint8(images)[0, ..., 2].ravel() == np.arange(256)).all()


def test_values_are_rounded_and_clamped():
    values = torch.tensor([-torch.inf, -7.0, -1.0, 0.4, 0.6, 254.4, 254.6, 300.0, torch.inf])
    values[3:7] = values[3:7] / 127.5 - 1
    images = values.reshape(1, 1, 1, 9).expand(2, 3, 1, 9)
    assert to_uint8(images)[1, 0, :, 0].tolist() == [0, 0, 0, 0, 1, 254, 255, 255, 255]


def test_colours_and_sides_stay_where_they_are():
    image = torch.full((3, 2, 5), -1.0)
    image[0, 1, 4] = 1
    picture = to_pil(image.bfloat16().requires_grad_())
    assert picture.size == (5, 2)
    assert picture.getpixel((4, 1)) == (255, 0, 0)
    assert np.array(picture).sum() == 255


def test_a_tile_is_filled_row_by_row():
    picture = tile([grey(value) for value in (10, 20, 30, 40, 50)])
    assert picture.size == (3 * 6 + 2 * 2, 2 * 4 + 2)
    corners = [picture.getpixel((x, y))[0] for y in (0, 6) for x in (0, 8, 16)]
    assert corners == [10, 20, 30, 40, 50, 255]
    assert {picture.getpixel((x, 1)) for x in (6, 7, 14, 15)} == {WHITE}
    assert {picture.getpixel((1, y)) for y in (4, 5)} == {WHITE}
    assert picture.getpixel((21, 3)) == (30, 30, 30)


@pytest.mark.parametrize(("n", "columns", "size"), [(1, None, (6, 4)), (4, None, (13, 9))])
@pytest.mark.parametrize("kind", [list, torch.stack])
def test_a_tile_is_as_square_as_goes(n, columns, size, kind):
    assert tile(kind([grey(0)] * n), columns=columns, gap=1).size == size


def test_a_tile_takes_columns_and_gap():
    assert tile([grey(0)] * 4, columns=4, gap=0).size == (24, 4)
    assert tile([grey(0)] * 4, columns=1, gap=3).size == (6, 25)


TEXTS = {
    "long": "x" * 10_000,
    "emoji": "a 🦊 on 雪, שלום",
    "lines": "one\ntwo\r\n\tthree",
    "quotes": "\"a\" 'b' \\ {c: [d]} ${e} %f",
    "empty": "",
    "blank": "  both ends  ",
    "half an emoji": "\ud83d",
}


def test_what_is_stored_in_a_png_is_read_back(tmp_path):
    path = tmp_path / "new" / "folder" / "a.png"
    facts = TEXTS | {"prompts": ["a 🦊", 'b"'], "seed": 3, "nothing": None, "scale": 5.5}
    save_png(Image.new("RGB", (3, 2), "red"), path, facts)
    with Image.open(path) as image:
        image.load()
        assert image.getpixel((0, 0)) == (255, 0, 0)
        read = image.text
    expected = TEXTS | {
        "half an emoji": "?",
        "prompts": '["a 🦊", "b\\""]',
        "seed": "3",
        "nothing": "null",
        "scale": "5.5",
    }
    assert read == expected


def test_a_png_replaces_another_as_a_whole(tmp_path):
    path = tmp_path / "a.png"
    save_png(Image.new("RGB", (3, 2)), path, {"prompt": "first"})
    with pytest.raises(OSError, match="cannot write mode F as PNG"):
        save_png(Image.new("F", (3, 2)), path, {})
    with Image.open(path) as image:
        assert image.text == {"prompt": "first"}
    save_png(Image.new("RGB", (30, 20)), path, {"prompt": "second"})
    with Image.open(path) as image:
        assert (image.size, image.text) == ((30, 20), {"prompt": "second"})
    assert list(tmp_path.iterdir()) == [path]
