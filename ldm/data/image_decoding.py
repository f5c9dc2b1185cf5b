"""Decodes untrusted image files to upright RGB, and crops and resizes them.

Shapes: H W height and width in pixels. A Pillow image's `size` is (W, H).
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.data.color_profiles import convert_to_srgb, is_srgb

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
ImageFile = bytes | str | Path  # encoded, or the path of a file
TargetSize = int | tuple[int, int]  # pixels: the side of a square, or height and width
MAX_IMAGE_PIXELS = 64_000_000
MAX_IMAGE_BYTES = 32 * 2**20
MAX_VIDEO_PIXELS = 8 * MAX_IMAGE_PIXELS  # of all frames together, which are decoded in turn

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
_TURNED = (5, 6, 7, 8)  # those that exchange width and height


class ImageError(ValueError):
    """A damaged or too large image, or one in another format; `reason` has no numbers in it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def read_image_bytes(path: str | Path) -> bytes:
    """Returns the content of an image file; raises ImageError above `MAX_IMAGE_BYTES`."""
    _check_bytes(Path(path).stat().st_size)
    return Path(path).read_bytes()


def read_image(source: ImageFile) -> Image.Image:
    """Returns the first frame, upright, in sRGB, on white; raises ImageError with the reason."""
    data = source if isinstance(source, bytes) else read_image_bytes(source)
    return _decode_image(data, background="white")


def read_frames(data: bytes, frames: int) -> Iterator[Image.Image]:
    """Yields so many images of an animation (WebP, GIF, PNG): first, last, and evenly between."""
    with _open_image(data) as image:
        try:
            total = getattr(image, "n_frames", 1)
        except Exception as error:  # see _decode_image
            raise ImageError(f"damaged {image.format}", str(error)) from error
        if total < frames:
            raise ImageError("too few frames", f"{total} instead of {frames}")
        _check_pixels(
            total * image.width * image.height,
            f"{total} frames of {image.width} x {image.height}",
            limit=MAX_VIDEO_PIXELS,
        )
        for i in range(frames):
            try:
                image.seek(round(i * (total - 1) / max(frames - 1, 1)))
                rgb = _to_upright_rgb(image, background="white")
            except Exception as error:
                raise ImageError(f"damaged {image.format}", f"frame {i}: {error}") from error
            yield rgb


def read_raw_rgb(data: bytes, *, shrink: int = 1) -> Image.Image:
    """Returns a JPEG as it is stored: neither upright nor in sRGB.

    shrink: the decoder scales the sides by 1 / shrink (1, 2, 4 or 8), rounded up.
    """
    with _open_image(data) as image:
        try:
            image.draft("RGB", (image.width // shrink, image.height // shrink))
            return image.convert("RGB")
        except Exception as error:  # see _decode_image
            raise ImageError(f"damaged {image.format}", str(error)) from error


def needs_no_conversion(data: bytes, format: str) -> bool:
    """Whether the header says: one upright, opaque sRGB image in this Pillow format."""
    with _open_image(data) as image:
        return (
            image.format == format
            and image.mode == "RGB"
            and not image.has_transparency_data
            and getattr(image, "n_frames", 1) == 1
            and _orientation(image) not in _UPRIGHT
            and is_srgb(image)
        )


def read_image_size(data: bytes) -> tuple[int, int]:
    """Returns (width, height) of the upright image, by the header; `data` may end after it.

    The EXIF of a PNG that comes after its pixels is not looked for.
    """
    with _open_image(data) as image:
        turned = _orientation(image, may_decode=False) in _TURNED
        return image.size[::-1] if turned else image.size


def resize_short_side(image: Image.Image, size: int) -> Image.Image:
    """Resizes to `size` pixels on the short side, in proportion (bicubic, antialiased)."""
    short = min(image.size)
    width, height = (max(size, round(side * size / short)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def get_sides(size: TargetSize) -> tuple[int, int]:
    """Returns height and width of a size."""
    return (size, size) if isinstance(size, int) else size


def describe_size(size: TargetSize) -> int | list[int]:
    """Returns a size as JSON has it."""
    return size if isinstance(size, int) else list(size)


class CropBox(NamedTuple):
    """A part of an image, in its pixels."""

    left: int
    top: int
    width: int
    height: int


def find_crop_box(
    width: int, height: int, size: TargetSize, *, x: float, y: float, even: bool = False
) -> CropBox:
    """Returns the largest box of an image that has the aspect of `size`.

    x, y in [0, 1] run from left and top to right and bottom. even: all positions have the same
    share of [0, 1], otherwise the outermost have half of that.
    """
    h, w = get_sides(size)
    box_width, box_height = width, height
    if width * h >= height * w:
        box_width = min(max(round(height * w / h), 1), width)
    else:
        box_height = min(max(round(width * h / w), 1), height)
    right, bottom = width - box_width, height - box_height
    if even:
        left, top = min(int(x * (right + 1)), right), min(int(y * (bottom + 1)), bottom)
    else:
        left, top = round(x * right), round(y * bottom)
    return CropBox(left, top, box_width, box_height)


def describe_crop(
    width: int, height: int, size: TargetSize, *, flip: bool = False, **place: float
) -> tuple[int, ...]:
    """Returns the six numbers of `Condition.sizes` for the box of `find_crop_box`.

    They are the image's height and width, top and left of the crop in the image as it is scaled,
    and `size`. flip: the image is turned left to right ("SDXL", Podell et al. 2023, section 2.2).
    """
    h, w = get_sides(size)
    box = find_crop_box(width, height, size, **place)
    left = width - box.width - box.left if flip else box.left
    return height, width, round(box.top * h / box.height), round(left * w / box.width), h, w


def crop_and_resize(
    image: Image.Image, size: TargetSize, *, x: float = 0.5, y: float = 0.5, even: bool = False
) -> Image.Image:
    """Crops the box of `find_crop_box`, and resizes it to `size` (bicubic, antialiased).

    In this order, because enlarging an image of 1 x 20000 pixels would take gigabytes.
    """
    box = find_crop_box(*image.size, size, x=x, y=y, even=even)
    crop = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
    height, width = get_sides(size)
    return crop.resize((width, height), Image.Resampling.BICUBIC)


def read_cropped_image(source: ImageFile, size: TargetSize) -> Tensor:
    """Returns the centre of an image file, (3, h, w) in [-1, 1]."""
    return pil_to_tensor(crop_and_resize(read_image(source), size)).float() / 127.5 - 1


def read_mask(source: ImageFile, size: TargetSize, *, of: ImageFile | None = None) -> Tensor:
    """Returns a mask (1, h, w) of 0 and 1 (bright) from the centre of an image of any mode.

    of: the image that the mask is for, which must have the same size. Transparent pixels are 0.
    """
    data = source if isinstance(source, bytes) else read_image_bytes(source)
    light = _decode_image(data, background="black")
    name = "it" if isinstance(source, bytes) else source
    if of is not None and (sides := read_image(of).size) != light.size:
        image = "its image" if isinstance(of, bytes) else f"its image {of}"
        sizes = f"{light.width} x {light.height}, but {image} is {sides[0]} x {sides[1]}"
        raise ImageError("a mask of another size", f"{name} is {sizes}")
    brightness = pil_to_tensor(crop_and_resize(light, size)).float().mean(0, keepdim=True)
    mask = (brightness > 127.5).float()
    if not mask.any():
        raise ImageError(
            "an empty mask", f"{name} is dark everywhere; white is what is generated anew"
        )
    return mask


def pil_to_tensor(image: Image.Image) -> Tensor:
    """Returns the pixels of an RGB image, uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _decode_image(data: bytes, *, background: str) -> Image.Image:
    with _open_image(data) as image:
        try:
            return _to_upright_rgb(image, background=background)
        except Exception as error:  # Pillow's decoders raise a dozen kinds for damaged files
            raise ImageError(f"damaged {image.format}", str(error)) from error


def _open_image(data: bytes) -> Image.Image:
    _check_bytes(len(data))
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"no {', '.join(IMAGE_FORMATS)} file", f"{len(data)} bytes") from error
    except Exception as error:  # see _decode_image; also Pillow's own limit of pixels
        raise ImageError("unreadable header", str(error)) from error
    width, height = image.size
    _check_pixels(width * height, f"{width} x {height}", limit=MAX_IMAGE_PIXELS)
    return image


def _check_bytes(size: int) -> None:
    if size > MAX_IMAGE_BYTES:
        limit = f"the limit is {MAX_IMAGE_BYTES:,}"
        raise ImageError("too many bytes", f"{size} encoded bytes, {limit}")


def _check_pixels(pixels: int, description: str, *, limit: int) -> None:
    if pixels > limit:
        raise ImageError("too many pixels", f"{description} are over the limit of {limit:,}")


def _orientation(image: Image.Image, *, may_decode: bool = True) -> int:
    try:  # PNG's own method decodes the pixels, for EXIF after them
        exif = image.getexif() if may_decode else Image.Image.getexif(image)
        return exif.get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF: the pixels may be intact
        return 1


def _to_upright_rgb(image: Image.Image, *, background: str) -> Image.Image:
    """Decodes the current frame: upright, in sRGB, transparency composited on `background`."""
    level = _find_transparent_level(image)
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    if image.mode.startswith("I"):
        image = _to_eight_bits(image, level)
    elif level is not None:
        image.info["transparency"] = level
    has_alpha = image.has_transparency_data
    rgb = image.convert("RGBA" if has_alpha else "RGB")
    if (converted := convert_to_srgb(image)) is not None:
        if has_alpha:
            converted.putalpha(rgb.getchannel("A"))
        rgb = converted
    if has_alpha:
        canvas = Image.new("RGBA", rgb.size, background)
        canvas.alpha_composite(rgb)
        rgb = canvas.convert("RGB")
    if turn is not None:
        rgb = rgb.transpose(turn)
    rgb.info = {}  # profile and orientation are applied, and must not be saved with the pixels
    return rgb


def _to_eight_bits(image: Image.Image, transparent: int | None) -> Image.Image:
    """Converts 16-bit grey to 8 bits with alpha; Pillow's conversion clips at 255."""
    levels = np.asarray(image).astype(np.int64)
    grey = Image.fromarray((levels >> 8).clip(0, 255).astype(np.uint8))
    if transparent is not None:
        grey.putalpha(Image.fromarray(((levels != transparent) * 255).astype(np.uint8)))
    grey.info = {name: value for name, value in image.info.items() if name != "transparency"}
    return grey


def _find_transparent_level(image: Image.Image) -> int | tuple[int, ...] | None:
    """Returns the transparent level of a PNG of 2, 4 or 16 bits; it must not be decoded yet."""
    level = image.info.get("transparency")
    if image.format != "PNG" or level is None or not image.tile:
        return None
    convert = {
        "L;2": lambda level: 85 * level,
        "L;4": lambda level: 17 * level,
        "I;16B": lambda level: level,
        "RGB;16B": lambda levels: tuple(level >> 8 for level in levels),
    }
    stored = image.tile[0].args
    return convert[stored](level) if stored in convert else None
