"""Encoded pictures to upright RGB, and from there to squares of pixels.

Shapes: H W height and width in pixels. A Pillow image's `size` is (W, H).
"""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.data.color_profiles import convert_to_srgb, is_srgb

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_IMAGE_PIXELS = 64_000_000
MAX_IMAGE_BYTES = 32 * 2**20
MAX_VIDEO_PIXELS = (
    8 * MAX_IMAGE_PIXELS
)  # of all frames together, which are decoded one after another

_ORIENTATION = 0x0112  # EXIF 2.32, table 4
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """A picture that is damaged, too large, or in no format of `FORMATS`.

    `reason` has no numbers in it, so that pictures may be counted by it.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def read_image_bytes(path: str | Path) -> bytes:
    """The encoded picture in a file.

    Raises ImageError above `MAX_BYTES`, before anything is read.
    """
    _check_bytes(Path(path).stat().st_size)
    return Path(path).read_bytes()


def read_image(source: bytes | str | Path) -> Image.Image:
    """The first frame of an encoded picture, upright, in sRGB, transparency laid on white.

    `source` holds the encoded bytes or is the path of a file. Size and format are checked on the
    header, before any pixel is decoded. Colours are converted by the picture's ICC profile.
    Raises ImageError with the reason where the picture cannot be had in full.
    """
    return _decode_image(
        source if isinstance(source, bytes) else read_image_bytes(source), below="white"
    )


def read_frames(data: bytes, frames: int) -> Iterator[Image.Image]:
    """`frames` pictures of an animation (WebP, GIF, PNG): first, last, and evenly between.

    Each as `read_image` gives it. Frame count and size are checked on the headers, before any
    pixel is decoded. Raises ImageError as `read_image` does, and where there are fewer frames.
    """
    with _open_image(data) as image:
        try:
            there = getattr(image, "n_frames", 1)
        except Exception as error:  # as in read_image
            raise ImageError(f"damaged {image.format}", str(error)) from error
        if there < frames:
            raise ImageError("too few frames", f"{there} where {frames} are asked for")
        if there * image.width * image.height > MAX_VIDEO_PIXELS:
            said = f"{there} frames of {image.width} x {image.height}"
            raise ImageError(
                "too many pixels", f"{said} are over the limit of {MAX_VIDEO_PIXELS:,}"
            )
        for i in range(frames):
            try:
                image.seek(round(i * (there - 1) / max(frames - 1, 1)))
                rgb = _to_upright_rgb(image, below="white")
            except Exception as error:
                raise ImageError(f"damaged {image.format}", f"frame {i}: {error}") from error
            yield rgb


def needs_no_conversion(data: bytes, format: str) -> bool:
    """Whether the header says: one upright, opaque sRGB picture in this Pillow format already.

    Raises ImageError as `read_image` does for what a header shows.
    """
    with _open_image(data) as image:
        return (
            image.format == format
            and image.mode == "RGB"
            and not image.has_transparency_data
            and getattr(image, "n_frames", 1) == 1
            and _orientation(image) not in _UPRIGHT
            and is_srgb(image)
        )


def read_short_side(data: bytes) -> int:
    """Pixels of the short side, by the header; `data` may end after it.

    Raises ImageError as `read_image` does for what a header shows.
    """
    with _open_image(data) as image:
        return min(image.size)


def resize_short_side(image: Image.Image, size: int) -> Image.Image:
    """The picture with its short side at `size` pixels, in proportion (bicubic, antialiased)."""
    short = min(image.size)
    width, height = (max(size, round(side * size / short)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def crop_square(
    image: Image.Image, size: int, *, x: float, y: float, even: bool = False
) -> Image.Image:
    """A square of `size` pixels; x, y in [0, 1] run from left and top to right and bottom.

    (0.5, 0.5) is the centre. even: each of its places has the same share of [0, 1], where else the
    first and the last have half of the others'. Raises ValueError where the picture is smaller than
    the square.
    """
    width, height = image.size
    if size > min(width, height):
        raise ValueError(f"cannot crop {size} x {size} pixels from {width} x {height}")
    if even:
        left = min(int(x * (width - size + 1)), width - size)
        top = min(int(y * (height - size + 1)), height - size)
    else:
        left, top = round(x * (width - size)), round(y * (height - size))
    return image.crop((left, top, left + size, top + size))


def crop_and_resize(
    image: Image.Image, size: int, *, x: float = 0.5, y: float = 0.5, even: bool = False
) -> Image.Image:
    """A square of the picture's shorter side, placed as in `crop`, scaled to `size` pixels.

    It is cut first, because scaling up a picture of 1 x 20000 pixels would take gigabytes.
    """
    return resize_short_side(crop_square(image, min(image.size), x=x, y=y, even=even), size)


def read_square_image(path: str | Path, size: int) -> Tensor:
    """The picture in a file as an image (3, size, size) in [-1, 1], the middle of its long side.

    Raises what `read_image` raises.
    """
    return pil_to_tensor(crop_and_resize(read_image(path), size)).float() / 127.5 - 1


def read_mask(path: str | Path, size: int, *, of: str | Path | None = None) -> Tensor:
    """A mask (1, size, size) of 0 and 1 from a picture of any mode, cut as `read_square` cuts.

    1 is where it is bright; what is transparent is not. It is turned upright as its picture is,
    which `of` names.
    Raises ImageError as `read_image` does, where nothing is bright, and where it is of another size
    than its picture.
    """
    light = _decode_image(read_image_bytes(path), below="black")
    if of is not None and (sides := read_image(of).size) != light.size:
        both = "{} x {} where its picture {} is {} x {}".format(*light.size, of, *sides)
        raise ImageError("a mask of another size", f"{path} is {both}")
    mask = (
        pil_to_tensor(crop_and_resize(light, size)).float().mean(0, keepdim=True) > 127.5
    ).float()
    if not mask.any():
        raise ImageError(
            "an empty mask", f"{path} is dark everywhere; white is what is painted anew"
        )
    return mask


def pil_to_tensor(image: Image.Image) -> Tensor:
    """The pixels of an RGB picture, uint8 (3, H, W), in 0..255."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _decode_image(data: bytes, *, below: str) -> Image.Image:
    """The first frame, as `_upright` gives it; every reader of a single picture ends here."""
    with _open_image(data) as image:
        try:
            return _to_upright_rgb(image, below=below)
        except Exception as error:  # Pillow's decoders raise a dozen kinds on damaged files
            raise ImageError(f"damaged {image.format}", str(error)) from error


def _open_image(data: bytes) -> Image.Image:
    _check_bytes(len(data))
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"no {', '.join(IMAGE_FORMATS)} file", f"{len(data)} bytes") from error
    except Exception as error:  # as in read_image; Pillow's own bomb limit among them
        raise ImageError("unreadable header", str(error)) from error
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        raise ImageError(
            "too many pixels", f"{width} x {height} are over the limit of {MAX_IMAGE_PIXELS:,}"
        )
    return image


def _check_bytes(size: int) -> None:
    if size > MAX_IMAGE_BYTES:
        raise ImageError(
            "too many bytes", f"{size} encoded bytes, the limit is {MAX_IMAGE_BYTES:,}"
        )


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF says nothing about the pixels: take them as they lie
        return 1


def _to_upright_rgb(image: Image.Image, *, below: str) -> Image.Image:
    """The frame that is sought: upright, in sRGB, transparency laid on the color `below`."""
    key = _find_transparent_level(image)
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    if image.mode.startswith("I"):
        image = _to_eight_bits(image, key)
    elif key is not None:
        image.info["transparency"] = key
    clear = image.has_transparency_data
    rgb = image.convert("RGBA" if clear else "RGB")
    if (colors := convert_to_srgb(image)) is not None:
        if clear:
            colors.putalpha(rgb.getchannel("A"))
        rgb = colors
    if clear:
        laid = Image.new("RGBA", rgb.size, below)
        laid.alpha_composite(rgb)
        rgb = laid.convert("RGB")
    if turn is not None:
        rgb = rgb.transpose(turn)
    rgb.info = {}  # a spent profile or orientation must not be written with these pixels
    return rgb


def _to_eight_bits(image: Image.Image, key: int | None) -> Image.Image:
    """16-bit grey in 8 bits, without the transparent level; Pillow's conversion clips at 255."""
    levels = np.asarray(image).astype(np.int64)
    grey = Image.fromarray((levels >> 8).clip(0, 255).astype(np.uint8))
    if key is not None:
        grey.putalpha(Image.fromarray(((levels != key) * 255).astype(np.uint8)))
    grey.info = {name: value for name, value in image.info.items() if name != "transparency"}
    return grey


def _find_transparent_level(image: Image.Image) -> int | tuple[int, ...] | None:
    """The transparent level or color of a PNG that Pillow decodes to other levels than it names.

    Those are of 2, 4 or 16 bits. To be called before pixels are decoded.
    """
    key = image.info.get("transparency")
    if image.format != "PNG" or key is None or not image.tile:
        return None
    convert = {
        "L;2": lambda level: 85 * level,
        "L;4": lambda level: 17 * level,
        "I;16B": lambda level: level,
        "RGB;16B": lambda levels: tuple(level >> 8 for level in levels),
    }
    stored = image.tile[0].args
    return convert[stored](key) if stored in convert else None
