import io
import random
import re
import struct
from contextlib import suppress

import numpy as np
import pytest
import torch
from material import encoded
from PIL import Image
from profiles import grey_profile, ink_profile, rgb_profile

from ldm.data import box_reading
from ldm.data.box_reading import find_plain_jpeg, read_box
from ldm.data.image_decoding import (
    ImageError,
    crop_and_resize,
    find_crop_box,
    pil_to_tensor,
    read_image,
)


def noise(width: int, height: int) -> Image.Image:
    """A smooth picture of random colours."""
    pixels = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def with_orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def xmp(value: bytes) -> bytes:
    return b'<x tiff:Orientation="%s"/>' % value


def pillow(data: bytes, size: int, *, x: float = 0.5) -> torch.Tensor:
    """Pillow alone: everything converted, then cropped, then resized."""
    return pil_to_tensor(crop_and_resize(read_image(data), size, x=x)).int()


def read_pixels(*args, **options) -> torch.Tensor:
    return read_box(*args, **options)[0]


def without_quick_decoder(monkeypatch, *args, **options) -> torch.Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(box_reading, "simplejpeg", None)
        return read_pixels(*args, **options)


IMAGE = noise(48, 36)
PLAIN = {
    "420": encoded(IMAGE, "JPEG"),
    "444": encoded(IMAGE, "JPEG", subsampling=0, quality=95),
    "progressive": encoded(IMAGE, "JPEG", progressive=True),
    "restarts": encoded(IMAGE, "JPEG", restart_marker_blocks=2),
    "grey": encoded(IMAGE.convert("L"), "JPEG"),
    "RGB": encoded(IMAGE, "JPEG", keep_rgb=True),
    "upright": encoded(IMAGE, "JPEG", exif=with_orientation(1), comment="a"),
    "damaged EXIF": encoded(IMAGE, "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff\xff\xff"),
    "XMP": encoded(IMAGE, "JPEG", xmp=xmp(b"1")),
    "sRGB": encoded(IMAGE, "JPEG", icc_profile=b"no profile"),
    "P3": encoded(IMAGE, "JPEG", icc_profile=rgb_profile()),
}
OTHERS = {
    "turned": encoded(IMAGE, "JPEG", exif=with_orientation(6)),
    "turned by XMP": encoded(IMAGE, "JPEG", xmp=xmp(b"6")),
    "CMYK": encoded(IMAGE.convert("CMYK"), "JPEG", icc_profile=ink_profile()),
    "grey of a profile": encoded(IMAGE.convert("L"), "JPEG", icc_profile=grey_profile(1.8)),
    "profile in parts": encoded(IMAGE, "JPEG", icc_profile=rgb_profile() + bytes(70_000)),
    "PNG": encoded(IMAGE),
    "transparent": encoded(IMAGE.convert("RGBA")),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_jpegs_have_the_pixels_of_pillow(kind, monkeypatch):
    """Bit for bit where nothing is resized, with or without the quick decoder."""
    data = PLAIN[kind]
    assert find_plain_jpeg(data)[:2] == (48, 36)
    for x in (0.0, 0.4, 1.0):
        quick = read_pixels(data, 36, x=x)
        assert torch.equal(quick.int(), pillow(data, 36, x=x))
        assert torch.equal(quick, without_quick_decoder(monkeypatch, data, 36, x=x))
        assert (quick.shape, quick.dtype) == ((3, 36, 36), torch.uint8)


@pytest.mark.parametrize("kind", [*PLAIN, *OTHERS])
@pytest.mark.parametrize("size", [16, 50])
def test_resized_pixels_are_within_two_of_pillow(kind, size):
    data = (PLAIN | OTHERS)[kind]
    difference = (read_pixels(data, size).int() - pillow(data, size)).abs().float()
    if kind == "P3":  # colours are converted after the resize
        assert difference.mean() < 2
    else:
        assert difference.max() <= 2


@pytest.mark.parametrize("kind", [*PLAIN, *OTHERS])
def test_boxes_have_the_pixels_of_pillow(kind):
    """Bit for bit where nothing is resized, within two levels elsewhere."""
    data = (PLAIN | OTHERS)[kind]
    for size in ((36, 24), (18, 48), (24, 40), (50, 20), (9, 12), (48, 64)):
        for x, even in ((0.0, False), (0.7, True), (1.0, False)):
            quick, sides = read_box(data, size, x=x, y=0.2, even=even)
            wanted = pil_to_tensor(crop_and_resize(read_image(data), size, x=x, y=0.2, even=even))
            assert sides == read_image(data).size
            assert quick.shape == (3, *size)
            difference = (quick.int() - wanted.int()).abs().float()
            crop = find_crop_box(*sides, size, x=x, y=0.2, even=even)
            if (crop.height, crop.width) == size:
                assert difference.max() == 0
            elif kind == "P3":
                assert difference.mean() < 2
            else:
                assert difference.max() <= 2


def test_a_much_larger_jpeg_is_decoded_smaller_for_a_box(monkeypatch):
    """By the side that is scaled least."""
    image, shrunk = noise(576, 432), []
    decode = box_reading._decode_jpeg
    monkeypatch.setattr(
        box_reading, "_decode_jpeg", lambda *args: shrunk.append(args[2]) or decode(*args)
    )
    for size, factor in (((72, 96), 2), ((73, 96), 1), ((72, 97), 1), ((36, 48), 4), ((9, 24), 8)):
        data = encoded(image, "JPEG", quality=92)
        quick, sides = read_box(data, size)
        assert shrunk.pop() == factor
        assert sides == (576, 432)
        assert torch.equal(quick, without_quick_decoder(monkeypatch, data, size))
        wanted = pil_to_tensor(crop_and_resize(read_image(data), size))
        # The crop moves by less than a pixel of the smaller image.
        assert (quick.int() - wanted.int()).abs().float().mean() < 6


@pytest.mark.parametrize("kind", OTHERS)
def test_other_images_are_left_to_pillow(kind):
    assert find_plain_jpeg(OTHERS[kind]) is None
    assert torch.equal(read_pixels(OTHERS[kind], 36).int(), pillow(OTHERS[kind], 36))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_are_applied(orientation):
    data = encoded(IMAGE, "JPEG", exif=with_orientation(orientation))
    assert torch.equal(read_pixels(data, 36, x=0.2).int(), pillow(data, 36, x=0.2))


def test_photographs_are_decoded_to_the_same_bits_with_and_without_the_quick_decoder(
    real_data, monkeypatch
):
    """And differ little from Pillow's."""
    pytest.importorskip("simplejpeg")
    plain = 0
    for file in sorted(real_data("coco_mini").rglob("*.jpg")):
        data = file.read_bytes()
        header = find_plain_jpeg(data)
        plain += header is not None
        for size in (48, 192):
            quick = read_pixels(data, size)
            assert torch.equal(quick, without_quick_decoder(monkeypatch, data, size))
            if header is None or header.profile:
                continue
            difference = (quick.int() - pillow(data, size)).abs().float()
            left, top = (side - min(header[:2]) for side in header[:2])
            if size == 192:
                assert difference.max() <= 2
            elif not any(n % 4 for n in (left, top, min(header[:2]))):  # half a pixel is a pixel
                assert difference.max() <= 10
                assert difference.mean() < 0.6
            else:  # the crop moves by a pixel of the file at most
                assert difference.mean() < 6
    assert plain > 100


def test_a_much_larger_jpeg_is_decoded_smaller(monkeypatch):
    """To half, a quarter or an eighth: three times the wanted side remains."""
    image, shrunk = noise(576, 432), []
    decode = box_reading._decode_jpeg
    monkeypatch.setattr(
        box_reading, "_decode_jpeg", lambda *args: shrunk.append(args[2]) or decode(*args)
    )
    for size, factor in ((73, 1), (72, 2), (36, 4), (18, 8), (4, 8)):
        for options in ({}, {"progressive": True}, {"subsampling": 0}):
            data = encoded(image, "JPEG", quality=92, **options)
            quick = read_pixels(data, size)
            assert shrunk.pop() == factor
            assert torch.equal(quick, without_quick_decoder(monkeypatch, data, size))
            difference = (quick.int() - pillow(data, size)).abs().float()
            assert difference.max() <= 12
            assert difference.mean() < 1.5


@pytest.mark.parametrize("kind", ["420", "progressive", "grey", "restarts"])
def test_a_truncated_jpeg_is_never_half_a_picture(kind):
    data, whole, refused = PLAIN[kind], read_pixels(PLAIN[kind], 24), 0
    for cut in range(len(data)):
        try:
            assert torch.equal(read_pixels(data[:cut], 24), whole)
        except ImageError as error:
            refused += 1
            with pytest.raises(ImageError, match=re.escape(error.reason)):
                read_image(data[:cut])
    assert refused >= len(data) - 24


def damage(rng: random.Random, data: bytes) -> bytes:
    damaged, at = bytearray(data), rng.randrange(len(data))
    kind = rng.choice(["cut", "lost", "added", "changed", "changed", "header"])
    if kind == "cut":
        return data[:at]
    if kind == "lost":
        return data[:at] + data[at + rng.randrange(1, 30) :]
    if kind == "added":
        return data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:]
    for _ in range(rng.randrange(1, 4)):
        damaged[rng.randrange(min(len(data), 700 if kind == "header" else 2**20))] = rng.randrange(
            256
        )
    return bytes(damaged)


def test_damage_has_the_same_outcome_with_and_without_the_quick_decoder(monkeypatch):
    """The same reason, or the same pixels."""
    rng, outcomes = random.Random(0), {True: 0, False: 0}
    kinds = [data for kind, data in (PLAIN | OTHERS).items() if kind not in ("PNG", "transparent")]

    def outcome(read):
        try:
            return read()
        except ImageError as error:
            return error.reason

    for _ in range(500):
        data, size = damage(rng, rng.choice(kinds)), rng.choice([4, 24, 36])
        quick = outcome(lambda: read_pixels(data, size))  # noqa: B023
        slow = outcome(lambda: without_quick_decoder(monkeypatch, data, size))  # noqa: B023
        is_image = isinstance(quick, torch.Tensor)
        assert torch.equal(quick, slow) if is_image else quick == slow
        outcomes[is_image] += 1
    assert min(outcomes.values()) > 50


def test_a_bomb_is_refused_by_its_header():
    data = bytearray(PLAIN["420"])
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 65_500, 65_500)
    assert find_plain_jpeg(bytes(data)) is None
    with pytest.raises(ImageError) as error:
        read_pixels(bytes(data), 16)
    assert error.value.reason in ("too many pixels", "unreadable header")
    for junk in (b"", b"\xff\xd8", b"\xff\xd8\xff\xe1\0\1", b"\xff\xd8" + b"\xff\xe0\0\2" * 99):
        assert find_plain_jpeg(junk) is None
        with suppress(ImageError):
            read_pixels(junk, 16)


def test_pillow_reads_what_is_stored_and_refuses_the_rest():
    image = Image.open(io.BytesIO(PLAIN["P3"])).convert("RGB")
    assert box_reading.read_raw_rgb(PLAIN["P3"]) == image
    assert box_reading.read_raw_rgb(OTHERS["turned"]).size == (48, 36)
    with pytest.raises(ImageError, match="damaged JPEG"):
        box_reading.read_raw_rgb(PLAIN["420"][:-100])
