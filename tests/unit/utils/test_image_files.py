"""Pictures out of tensors, and PNG files that carry what made them."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.utils.images import (
    load_font,
    make_captioned_grid,
    make_image_grid,
    save_png,
    to_pil,
    to_uint8,
    wrap_text,
)

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


def test_channels_and_axes_are_kept():
    image = torch.full((3, 2, 5), -1.0)
    image[0, 1, 4] = 1
    picture = to_pil(image.bfloat16().requires_grad_())
    assert picture.size == (5, 2)
    assert picture.getpixel((4, 1)) == (255, 0, 0)
    assert np.array(picture).sum() == 255


def test_a_grid_is_filled_row_by_row():
    picture = make_image_grid([grey(value) for value in (10, 20, 30, 40, 50)])
    assert picture.size == (3 * 6 + 2 * 2, 2 * 4 + 2)
    corners = [picture.getpixel((x, y))[0] for y in (0, 6) for x in (0, 8, 16)]
    assert corners == [10, 20, 30, 40, 50, 255]
    assert {picture.getpixel((x, 1)) for x in (6, 7, 14, 15)} == {WHITE}
    assert {picture.getpixel((1, y)) for y in (4, 5)} == {WHITE}
    assert picture.getpixel((21, 3)) == (30, 30, 30)


@pytest.mark.parametrize(("n", "columns", "size"), [(1, None, (6, 4)), (4, None, (13, 9))])
@pytest.mark.parametrize("kind", [list, torch.stack])
def test_a_grid_is_as_square_as_possible(n, columns, size, kind):
    assert make_image_grid(kind([grey(0)] * n), columns=columns, gap=1).size == size


def test_a_grid_has_the_requested_columns_and_gap():
    assert make_image_grid([grey(0)] * 4, columns=4, gap=0).size == (24, 4)
    assert make_image_grid([grey(0)] * 4, columns=1, gap=3).size == (6, 25)


@pytest.mark.parametrize(("side", "enlarged"), [(64, 192), (100, 200), (256, 256)])
def test_captioned_images_are_enlarged(side, enlarged):
    images = [grey(value, height=side, width=side) for value in (10, 90, 170)]
    captions = ["short", "a caption of two lines or more, as it says many things", ""]
    picture = make_captioned_grid(images, captions, columns=2)
    assert picture.width == 2 * enlarged + 12
    pixels = np.array(picture)[..., 0]
    assert (pixels[:enlarged, :enlarged] == 10).all()
    assert (pixels[:enlarged, -enlarged:] == 90).all()
    assert pixels[enlarged : enlarged + 20, :enlarged].min() < 60, "text beneath the first"
    assert (pixels[enlarged + 24 : enlarged + 40, :enlarged] == 255).all(), "of one line"
    assert pixels[enlarged + 24 : enlarged + 40, -enlarged:].min() < 60, "the second has two"


def test_captions_have_as_many_rows_as_the_longest():
    images = [grey(10, height=64, width=64)] * 2
    one = make_captioned_grid(images, ["short", ""], columns=2)
    two = make_captioned_grid(images, ["short", "one two three four five six"], columns=2)
    most = make_captioned_grid(images, ["short", "word " * 100], columns=2)
    assert one.height < two.height < most.height < 2 * 192


def test_lines_fit_and_lose_no_word():
    letters, text = load_font(15), "a big\nred circle  left of a\tsmall star, both striped"
    lines = wrap_text(text, 90, letters, max_lines=9)
    assert " ".join(lines) == " ".join(text.split())
    assert max(map(letters.getlength, lines)) <= 90
    for line, following in pairwise(lines):
        assert letters.getlength(f"{line} {following.split()[0]}") > 90, "lines are full"


def test_too_long_a_text_or_word_is_cut():
    letters = load_font(15)
    lines = wrap_text("word " * 1000, 100, letters, max_lines=3)
    assert len(lines) == 3
    assert lines[2].endswith("d ...")
    lines = wrap_text("ab" * 40, 100, letters, max_lines=9)
    assert "".join(lines) == "ab" * 40
    assert max(map(letters.getlength, lines)) <= 100
    assert len(wrap_text("x" * 9999, 100, letters, max_lines=2)) == 2
    assert wrap_text("one", 1, letters, max_lines=3) == ["o", "n", "e"]


@pytest.mark.parametrize("text", ["", "  ", "half an emoji \ud83d", "Привет, 雪 🦊"])
def test_any_text_is_wrapped_and_drawn(text):
    assert len(wrap_text(text, 300, load_font(15), max_lines=2)) == 1
    make_captioned_grid([grey(1)], [text])


TEXTS = {
    "long": "x" * 10_000,
    "emoji": "a 🦊 on 雪, שלום",
    "lines": "one\ntwo\r\n\tthree",
    "quotes": "\"a\" 'b' \\ {c: [d]} ${e} %f",
    "empty": "",
    "blank": "  both ends  ",
    "half an emoji": "\ud83d",
}


def test_a_png_returns_image_and_facts(tmp_path):
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


def test_a_png_is_replaced_whole(tmp_path):
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


@pytest.mark.parametrize(("n", "shape"), [(4, (2, 2)), (5, (3, 2)), (8, (4, 2)), (9, (3, 3))])
def test_a_grid_is_square_or_one_wider_with_fewer_gaps(n, shape):
    columns, rows = shape
    assert make_image_grid(torch.zeros(n, 3, 10, 10), gap=0).size == (10 * columns, 10 * rows)
