import io
import struct
import time
import zlib
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from material import encoded, picture
from PIL import Image, ImageCms, ImageOps
from profiles import SRGB, SRGB_CURVE, grey_profile, ink_profile, rgb_profile

from ldm.data.image_decoding import (
    MAX_IMAGE_BYTES,
    ImageError,
    crop_and_resize,
    describe_crop,
    find_crop_box,
    needs_no_conversion,
    pil_to_tensor,
    read_frames,
    read_image,
    read_image_bytes,
    read_mask,
    resize_short_side,
)


def gradient(width: int = 32, height: int = 24) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 // width, y * 255 // height, (x + y) * 2], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def difference(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a, float) - np.asarray(b, float)).mean())


def png_chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def png_header(width: int, height: int, *, depth: int = 8, color: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_every_format_reads_as_rgb(format):
    image = read_image(encoded(gradient(), format))
    assert (image.mode, image.size) == ("RGB", (32, 24))
    assert difference(image, gradient()) < 12


@pytest.mark.parametrize("mode", ["1", "L", "P"])
@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_grey_and_palette_pixels_keep_their_colours(mode, format):
    source = gradient().convert(mode)
    assert difference(read_image(encoded(source, format)), source.convert("RGB")) == 0


def test_cmyk_jpeg_is_not_inverted():
    source = gradient()
    data = encoded(source.convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data  # Adobe stores the inks inverted
    assert difference(read_image(data), source) < 6


def test_cmyk_jpeg_drops_a_profile_that_does_not_fit_rgb():
    data = encoded(gradient().convert("CMYK"), "JPEG", icc_profile=b"cmyk")
    assert read_image(data).info == {}


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency_is_composited_on_white(mode):
    source = Image.new(mode, (4, 4), (0,) * len(mode))
    opaque = (0,) * (len(mode) - 1) + (255,)
    source.putpixel((1, 2), opaque)
    image = read_image(encoded(source))
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((1, 2)) == (0, 0, 0)


def test_transparent_palette_entry_is_white():
    source = Image.new("P", (2, 1))
    source.putpalette([10, 20, 30, 40, 50, 60])
    source.putpixel((1, 0), 1)
    image = read_image(encoded(source, "PNG", transparency=1))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (255, 255, 255)]


@pytest.mark.parametrize(
    ("depth", "color", "row", "clear", "others"),
    [
        (1, 0, b"\x40", (0,), 255),
        (1, 0, b"\x40", (1,), 0),
        (2, 0, b"\x30", (3,), 0),
        (4, 0, b"\x0f", (15,), 0),
        (8, 0, b"\x00\xff", (255,), 0),
        (16, 0, b"\x12\x33\x12\x34", (0x1234,), 0x12),
        (8, 2, b"\x00\x00\x00\x0a\x14\x1e", (10, 20, 30), 0),
        (16, 2, b"\x01" * 6 + b"\x0a\x01\x14\x02\x1e\x03", (0x0A01, 0x1402, 0x1E03), 1),
    ],
)
def test_a_transparent_level_is_white_at_every_depth(depth, color, row, clear, others):
    """Two pixels of a PNG, of which `clear` (as tRNS says) is one."""
    levels = struct.pack(f">{len(clear)}H", *clear)
    data = png_header(2, 1, depth=depth, color=color) + png_chunk(b"tRNS", levels)
    data += png_chunk(b"IDAT", zlib.compress(b"\0" + row)) + png_chunk(b"IEND", b"")
    pixels = [read_image(data).getpixel((x, 0)) for x in (0, 1)]
    assert sorted(pixels) == sorted([(others,) * 3, (255, 255, 255)])


def test_16_bit_grey_is_scaled_and_not_clipped():
    source = Image.fromarray(np.array([[0, 128 << 8, 255 << 8, 65535]], np.uint16))
    image = read_image(encoded(source))
    assert [image.getpixel((x, 0))[0] for x in range(4)] == [0, 128, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(gradient(), "PNG", exif=exif)
    with Image.open(io.BytesIO(data)) as stored:
        expected = ImageOps.exif_transpose(stored)
    assert difference(read_image(data), expected) == 0
    assert needs_no_conversion(data, "PNG") == (orientation == 1)


def test_every_frame_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [gradient(), gradient().transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    data = encoded(
        frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True, exif=exif
    )
    first, second = read_frames(data, 2)
    assert first == read_image(data)
    assert (first.size, second.size) == ((24, 32), (24, 32))


WIDE, GREY, INK = rgb_profile(), grey_profile(1.8), ink_profile()
# Of 1.8 to sRGB: (100 / 255) ** 1.8 = 0.1854, and 1.055 * 0.1854 ** (1 / 2.4) - 0.055 = 0.468.
# Of Display P3, (200, 50, 50) is (0.701, 0.009, 0.021) of linear sRGB.
CONVERTED = [
    ("RGB", (200, 50, 50), WIDE, (218, 24, 40)),
    ("P", (200, 50, 50), WIDE, (218, 24, 40)),
    ("L", 100, GREY, (119, 119, 119)),
    ("I;16", 100 << 8, GREY, (119, 119, 119)),
    ("CMYK", (0, 255, 0, 0), INK, (255, 255, 255)),
]


@pytest.mark.parametrize(("mode", "color", "profile", "expected"), CONVERTED)
def test_profiles_are_converted_to_srgb(mode, color, profile, expected):
    if mode == "P":
        source = Image.new("RGB", (8, 8), color).quantize(2)
    else:
        source = Image.new(mode, (8, 8), color)
    data = encoded(source, "JPEG" if mode == "CMYK" else "PNG", icc_profile=profile)
    image = read_image(data)
    assert np.abs(np.subtract(image.getpixel((4, 4)), expected)).max() <= 1
    assert image.info == {}
    assert not needs_no_conversion(data, "PNG")


def test_colors_are_converted_before_compositing():
    source = Image.new("RGBA", (2, 1), (200, 50, 50, 255))
    source.putpixel((1, 0), (200, 50, 50, 0))
    image = read_image(encoded(source, icc_profile=WIDE))
    assert np.abs(np.subtract(image.getpixel((0, 0)), (218, 24, 40))).max() <= 1
    assert image.getpixel((1, 0)) == (255, 255, 255)


PLAIN = {
    "of Pillow": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    "of other roundings": rgb_profile(SRGB, SRGB_CURVE),
    "of another kind of pixels": GREY,
    "broken": b"profile",
    "cut": WIDE[:200],
    "of a space whose name is no text": WIDE[:16] + b"\x80" + WIDE[17:],
}


@pytest.mark.parametrize("profile", PLAIN.values(), ids=PLAIN)
def test_srgb_and_broken_profiles_change_no_bit(profile):
    data = encoded(gradient(), icc_profile=profile)
    assert read_image(data) == gradient()
    assert needs_no_conversion(data, "PNG")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_an_image_with_a_damaged_profile_is_read(data):
    damaged = bytearray(data.draw(st.sampled_from([WIDE, INK])))
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    source = gradient(4, 4).convert("CMYK" if len(damaged) == len(INK) else "RGB")
    assert read_image(encoded(source, "JPEG", icc_profile=bytes(damaged))).size == (4, 4)


def test_an_image_with_damaged_exif_is_read():
    data = encoded(gradient(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff\xff\xff")
    assert read_image(data).size == (32, 24)


def test_only_the_first_frame_of_an_animation_is_read():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for format in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert read_image(data).getpixel((0, 0)) == (255, 0, 0), format
        assert not needs_no_conversion(data, format), format


@pytest.mark.parametrize("cut", [0, 1, 10, 100, 400])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_truncated_files_are_errors(format, cut):
    data = encoded(gradient(200, 100), format)
    with pytest.raises(ImageError):
        read_image(data[: min(cut, len(data) // 2)])


def test_other_formats_are_named_as_such():
    for data in (
        b"<html>not found</html>",
        encoded(gradient(), "TIFF"),
        encoded(gradient(), "PPM"),
    ):
        with pytest.raises(ImageError, match="no JPEG, PNG, WEBP, GIF, BMP file"):
            read_image(data)


@pytest.mark.parametrize("size", [(12_000, 12_000), (60_000, 60_000), (2**31 - 1, 1), (8001, 8000)])
def test_pixel_bombs_are_refused_by_their_header(size):
    begun = time.perf_counter()
    with pytest.raises(ImageError, match="limit"):
        read_image(png_header(*size) + png_chunk(b"IDAT", zlib.compress(bytes(10))))
    assert time.perf_counter() - begun < 0.5


def test_compressed_text_bomb_is_refused():
    text = png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100 * 2**20)))
    data = png_header(8, 8) + text + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")
    with pytest.raises(ImageError):
        read_image(data)


def test_too_many_encoded_bytes_are_refused(tmp_path):
    with pytest.raises(ImageError, match="encoded bytes"):
        read_image(picture() + bytes(MAX_IMAGE_BYTES))
    path = tmp_path / "huge.png"
    with open(path, "wb") as file:
        file.truncate(2**40)  # a hole: nothing is on the disk
    with pytest.raises(ImageError, match="encoded bytes"):
        read_image_bytes(path)


def test_path_and_bytes_give_the_same(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(3))
    assert read_image(tmp_path / "a.png") == read_image(str(tmp_path / "a.png"))
    assert read_image(tmp_path / "a.png") == read_image(picture(3))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_is_an_image_error_or_an_image(data):
    format = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP"]))
    damaged = bytearray(encoded(gradient(), format))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ImageError):
        assert read_image(bytes(damaged)).mode == "RGB"


def test_only_rgb_in_the_format_needs_no_conversion():
    assert needs_no_conversion(encoded(gradient(), "JPEG"), "JPEG")
    assert not needs_no_conversion(encoded(gradient(), "JPEG"), "PNG")
    assert not needs_no_conversion(encoded(gradient().convert("L"), "JPEG"), "JPEG")
    assert not needs_no_conversion(encoded(gradient(), "PNG", transparency=(0, 0, 0)), "PNG")


def test_resize_keeps_the_proportions():
    assert resize_short_side(gradient(64, 48), 24).size == (32, 24)
    assert resize_short_side(gradient(48, 64), 24).size == (24, 32)
    assert resize_short_side(gradient(10, 7), 14).size == (20, 14)
    assert resize_short_side(Image.new("RGB", (1000, 999)), 10).size == (10, 10)


def test_resize_is_antialiased():
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    image = resize_short_side(Image.fromarray(checks.astype(np.uint8)).convert("RGB"), 8)
    assert abs(np.asarray(image, float) - 127.5).max() < 3


def test_crop_runs_from_edge_to_edge():
    for x, left in ((0, 0), (0.5, 3), (1, 6)):
        assert find_crop_box(10, 4, 8, x=x, y=0.5) == (left, 0, 4, 4)
        assert find_crop_box(4, 10, 8, x=0.5, y=x) == (0, left, 4, 4)


def test_even_crops_have_every_position_equally_often():
    lefts = [find_crop_box(6, 4, 4, x=x, y=0.7, even=True).left for x in np.arange(300) / 300]
    assert [lefts.count(left) for left in range(3)] == [100, 100, 100]
    assert find_crop_box(6, 4, 4, x=1.0, y=1.0, even=True).left == 2  # a draw may round to 1


@given(
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    h=st.integers(1, 3000),
    w=st.integers(1, 3000),
    x=st.floats(0, 1),
    y=st.floats(0, 1),
    even=st.booleans(),
)
def test_a_box_is_the_largest_of_its_aspect(width, height, h, w, x, y, even):
    left, top, box_w, box_h = find_crop_box(width, height, (h, w), x=x, y=y, even=even)
    assert 0 <= left <= width - box_w
    assert 0 <= top <= height - box_h
    assert box_w == width or box_h == height
    scale = min(width / w, height / h)
    assert abs(box_w - max(w * scale, 1)) <= 0.5 + 1e-6
    assert abs(box_h - max(h * scale, 1)) <= 0.5 + 1e-6


def crop_square_as_before(image: Image.Image, size: int, *, x: float, y: float, even: bool):
    """What `crop_and_resize` was for squares, before there were other boxes."""
    width, height = image.size
    short = min(width, height)
    if even:
        left = min(int(x * (width - short + 1)), width - short)
        top = min(int(y * (height - short + 1)), height - short)
    else:
        left, top = round(x * (width - short)), round(y * (height - short))
    return resize_short_side(image.crop((left, top, left + short, top + short)), size)


def test_a_square_is_what_it_was_before():
    rng = np.random.default_rng(0)
    for _ in range(200):
        image = gradient(*rng.integers(1, 60, 2))
        size, even = int(rng.integers(1, 40)), bool(rng.integers(2))
        x, y = rng.random(2)
        wanted = crop_square_as_before(image, size, x=x, y=y, even=even)
        assert crop_and_resize(image, size, x=x, y=y, even=even) == wanted


def test_a_box_is_cropped_then_resized():
    image = gradient(10, 4)
    for x, left in ((0, 0), (0.5, 3), (1, 6)):
        assert crop_and_resize(image, 8, x=x) == image.crop((left, 0, left + 4, 4)).resize(
            (8, 8), Image.Resampling.BICUBIC
        )
    for x, left in ((0, 0), (0.5, 1), (1, 2)):
        assert crop_and_resize(image, (4, 8), x=x) == image.crop((left, 0, left + 8, 4))
    assert crop_and_resize(image, 8) == crop_and_resize(image, 8, x=0.5, y=0.5)
    assert crop_and_resize(gradient(1, 20000), 512).size == (512, 512), "in no time"
    assert crop_and_resize(gradient(1, 20000), (384, 640)).size == (640, 384), "in no time"


def test_a_panorama_in_its_own_aspect_is_not_cropped():
    image = gradient(160, 90)
    assert find_crop_box(160, 90, (36, 64), x=0.3, y=0.9) == (0, 0, 160, 90)
    wanted = image.resize((64, 36), Image.Resampling.BICUBIC)
    assert crop_and_resize(image, (36, 64)) == wanted


def test_a_crop_is_described_as_sdxl_does():
    """Height and width of the image, top and left of the crop where it is scaled, the size."""
    place = {"x": 0.25, "y": 0.5}
    assert describe_crop(1000, 500, 256, **place) == (500, 1000, 0, 64, 256, 256)
    assert describe_crop(1000, 500, 256, **place, flip=True) == (500, 1000, 0, 192, 256, 256)
    assert describe_crop(500, 1000, 256, x=0.5, y=1.0) == (1000, 500, 256, 0, 256, 256)
    assert describe_crop(640, 360, (288, 512), **place) == (360, 640, 0, 0, 288, 512)


def test_pil_to_tensor_has_channels_first():
    pixels = pil_to_tensor(gradient(5, 3))
    assert (pixels.shape, pixels.dtype) == ((3, 3, 5), torch.uint8)
    assert tuple(pixels[:, 1, 4].tolist()) == gradient(5, 3).getpixel((4, 1))


def masks():
    """The left half of 8 x 4 pixels, in modes that masks come in."""
    left = np.zeros((4, 8), np.uint8)
    left[:, :4] = 255
    grey = Image.fromarray(left)
    stroke = Image.new("RGBA", (8, 4), (255, 255, 255, 0))  # white, and transparent on the right
    stroke.putalpha(grey)
    return {
        "L": grey,
        "1": grey.convert("1"),
        "RGB": grey.convert("RGB"),
        "P": grey.convert("P"),
        "LA": Image.merge("LA", (Image.new("L", (8, 4), 255), grey)),
        "I;16": Image.fromarray(left.astype(np.uint16) * 257),
        "RGBA": stroke,
    }


@pytest.mark.parametrize("mode", masks())
def test_a_mask_is_one_where_it_is_bright(mode, tmp_path):
    masks()[mode].save(tmp_path / "mask.png")
    mask = read_mask(tmp_path / "mask.png", 4)  # the middle four columns
    assert mask.shape == (1, 4, 4)
    assert mask[0].tolist() == [[1.0, 1.0, 0.0, 0.0]] * 4


def test_a_mask_is_turned_like_its_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    masks()["L"].save(tmp_path / "mask.png", exif=exif)
    Image.new("RGB", (4, 8)).save(tmp_path / "picture.png")
    mask = read_mask(tmp_path / "mask.png", 4, of=tmp_path / "picture.png")
    assert mask[0].tolist() == [[1.0] * 4] * 2 + [[0.0] * 4] * 2  # its left is now above


def test_a_bad_mask_is_refused(tmp_path):
    Image.new("L", (8, 4)).save(tmp_path / "dark.png")
    with pytest.raises(ImageError, match="dark everywhere"):
        read_mask(tmp_path / "dark.png", 4)
    masks()["L"].save(tmp_path / "mask.png")
    Image.new("RGB", (9, 4)).save(tmp_path / "picture.png")
    with pytest.raises(ImageError, match=r"8 x 4, but its image .*picture.png is 9 x 4"):
        read_mask(tmp_path / "mask.png", 4, of=tmp_path / "picture.png")
