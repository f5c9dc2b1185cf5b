"""Converts images with an ICC profile to sRGB."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # ICC.1:2022, table 19, to Pillow's modes
_BASE = {"1": "L", "L": "L", "LA": "L", "P": "RGB", "RGB": "RGB", "RGBA": "RGB", "CMYK": "CMYK"}
_ROUNDING = 2  # levels of 255 by which the sRGB profiles of different makers differ
_CACHED_PROFILES = 32  # most images of a set share a few profiles


def convert_to_srgb(image: Image.Image) -> Image.Image | None:
    """Returns a loaded image in sRGB (RGB, opaque), or None if there is nothing to convert."""
    if (transform := _find_transform(image)) is None:
        return None
    return transform.apply(image.convert(_BASE[image.mode]))


def is_srgb(image: Image.Image) -> bool:
    """Whether `convert_to_srgb` has nothing to convert, by the header."""
    return _find_transform(image) is None


def _find_transform(image: Image.Image) -> ImageCms.ImageCmsTransform | None:
    profile = image.info.get("icc_profile")
    return find_srgb_transform(profile, _BASE.get(image.mode)) if profile else None


def find_srgb_transform(profile: bytes, mode: str | None) -> ImageCms.ImageCmsTransform | None:
    """Returns the transform to sRGB of images in this Pillow mode, or None if none is needed."""
    own_mode, transform = _build_transform(profile)
    return transform if own_mode == mode else None


@lru_cache(_CACHED_PROFILES)
def _build_transform(profile: bytes) -> tuple[str | None, ImageCms.ImageCmsTransform | None]:
    """Returns the Pillow mode of a profile, and its transform unless it is sRGB."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _MODES.get(source.profile.xcolor_space)
        srgb = ImageCms.createProfile("sRGB")
        transform = mode and ImageCms.buildTransform(source, srgb, mode, "RGB")
    except Exception:  # Pillow raises many kinds for damaged ones, also UnicodeDecodeError
        return None, None
    if mode is None or (mode != "CMYK" and _is_identity(transform, mode)):
        return mode, None
    return mode, transform


def _is_identity(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a transform leaves colours from all over the range as they are, but for rounding."""
    steps = np.linspace(0, 255, 9 if mode == "RGB" else 256).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
    before = Image.fromarray(grid if mode == "RGB" else steps[None])
    moved = np.asarray(transform.apply(before), int) - np.asarray(before.convert("RGB"), int)
    return int(np.abs(moved).max()) <= _ROUNDING
