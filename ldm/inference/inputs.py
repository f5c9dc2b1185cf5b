"""Image files and numbers of a user to the inputs of a pipeline; H W are pixels of the result."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data import image_decoding
from ldm.inference.image_size import format_image_size, parse_image_size
from ldm.inference.pipeline import Pipeline


@dataclass(frozen=True)
class PipelineInputs:
    """Images as a pipeline takes them: it generates `size`, of which `output_size` is the result.

    A network generates multiples of its own grid, and no less than it was trained on: an image to
    be enlarged is continued to the right and below, and `crop` cuts that off.
    """

    size: tuple[int, int]  # H, W
    image: Tensor | None = None  # (1 or N, 3, H / scale, W / scale) in [-1, 1]
    mask: Tensor | None = None  # (1, 1, H, W)
    output_size: tuple[int, int] | None = None  # None: all of it

    def tensors(self) -> dict[str, Tensor]:
        """The image and the mask, where there are such, under the pipeline's names."""
        named = {"image": self.image, "mask": self.mask}
        return {name: part for name, part in named.items() if part is not None}

    def crop(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Generated images (3, H, W), cut to the output size."""
        height, width = self.output_size or self.size
        return [image[..., :height, :width] for image in images]


def read_pipeline_inputs(
    pipeline: Pipeline,
    *,
    trained: int,
    size: int | Sequence[int] | None = None,
    image: str | bytes | None = None,
    mask: str | bytes | None = None,
    pad: Sequence[int] = (0, 0, 0, 0),
) -> PipelineInputs:
    """Reads an image, cropped to `size` or `trained` pixels square; one to enlarge is not cropped.

    size: the result's side, or its height and width. pad: new pixels to the left, above, right and
    below of the image; without `size` the result is larger by these.
    Raises ValueError, with the option's name, for files that are no images, for sizes that the
    network cannot generate, and for options that contradict each other.
    """
    task = pipeline.components.task
    if image is None and (mask is not None or any(pad)):
        raise ValueError("a mask, or pad, is for an image: image=FILE")
    if task.scale > 1:
        if mask is not None or any(pad) or size is not None:
            raise ValueError(
                f"task={task.name} takes neither mask nor pad nor size: the result is as large as "
                "task.scale says"
            )
        if image is None:
            raise ValueError(f"task={task.name} takes a small image: image=FILE")
        with prefix_file_errors("image", image):
            small = image_decoding.pil_to_tensor(image_decoding.read_image(image))
        return prepare_upscaling_inputs(pipeline, small.float()[None] / 127.5 - 1)
    grid = pipeline.size_multiple
    if any(pad):
        if mask is not None:
            raise ValueError("pad is a mask of its own: give either")
        return prepare_outpainting_inputs(image, trained, size, pad, grid=grid)
    sides = parse_image_size(trained if size is None else size, grid)
    if image is None:
        return PipelineInputs(sides)
    hidden = None
    if mask is not None:
        with prefix_file_errors("mask", mask):
            hidden = image_decoding.read_mask(mask, sides, of=image)[None]
    return PipelineInputs(sides, read_image_option("image", image, sides)[None], hidden)


def read_image_option(option: str, file: str | bytes, size: image_decoding.TargetSize) -> Tensor:
    """The image of a file that was given as `option`, cropped; ValueError names both."""
    with prefix_file_errors(option, file):
        return image_decoding.read_cropped_image(file, size)


@contextmanager
def prefix_file_errors(option: str, file: str | bytes) -> Iterator[None]:
    """Turns errors of an image file into ValueError with the option that gave the file."""
    try:
        yield
    except (OSError, image_decoding.ImageError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        place = option if isinstance(file, bytes) else f"{option}={file}"
        raise ValueError(f"{place}: {why}") from error


def prepare_upscaling_inputs(pipeline: Pipeline, images: Tensor) -> PipelineInputs:
    """Small images (N, 3, h, w) to be enlarged, as a pipeline takes them."""
    components = pipeline.components
    scale, least = components.task.scale, pipeline.trained_size or 0
    output_size = tuple(scale * side for side in images.shape[-2:])
    step = components.autoencoder.factor * scale  # both in whole pixels of the small image
    size = tuple(-(-max(side, least) // step) * step for side in output_size)
    below, right = ((full - side) // scale for full, side in zip(size, output_size, strict=True))
    whole = F.pad(images, (0, right, 0, below), mode="replicate")
    return PipelineInputs(size, whole, output_size=output_size)


def prepare_outpainting_inputs(
    file: str | bytes,
    trained: int,
    size: int | Sequence[int] | None,
    pad: Sequence[int],
    *,
    grid: int,
) -> PipelineInputs:
    """An image surrounded by grey, and the mask of the grey; see `read_pipeline_inputs`."""
    left, above, right, below = pad
    with prefix_file_errors("image", file):
        image = image_decoding.read_image(file)
    if size is None:
        image = image_decoding.crop_and_resize(image, trained)
        sides = (trained + above + below, trained + left + right)
        missing = [-side % grid for side in sides]
        if any(missing):
            fits = f"[{left},{above},{right + missing[1]},{below + missing[0]}]"
            raise ValueError(
                f"pad=[{left},{above},{right},{below}] makes {sides[1]} x {sides[0]} pixels, and "
                f"this run generates multiples of {grid}: pad={fits}"
            )
    else:
        sides = parse_image_size(size, grid)
        room = (sides[1] - left - right, sides[0] - above - below)  # width, height
        if not matches_aspect_ratio(image.size, room):
            raise ValueError(
                f"size={format_image_size(sides)} and pad leave {room[0]} x {room[1]} pixels "
                f"for an image of {image.width} x {image.height}: "
                f"{suggest_image_size(image.size, sides, pad, grid)}"
            )
        image = image.resize(room, reducing_gap=2.0)
    inside = image_decoding.pil_to_tensor(image).float() / 127.5 - 1  # (3, h, w)
    around = (left, right, above, below)
    mask = F.pad(torch.zeros_like(inside[:1]), around, value=1.0)
    return PipelineInputs(sides, F.pad(inside, around)[None], mask[None])


def matches_aspect_ratio(size: tuple[int, int], room: tuple[int, int]) -> bool:
    """Returns whether an image fills a room, width and height of both, to less than a pixel."""
    return min(room) > 0 and abs(size[0] * room[1] / size[1] - room[0]) < 1


def suggest_image_size(
    picture: tuple[int, int], sides: tuple[int, int], pad: Sequence[int], grid: int
) -> str:
    """The size nearest to `sides` in which pad leaves an image (width, height) its shape."""
    left, above, right, below = pad
    options = (
        (height, width)
        for height in range(grid, 2 * max(sides) + 1, grid)
        for width in range(grid, 2 * max(sides) + 1, grid)
        if matches_aspect_ratio(picture, (width - left - right, height - above - below))
    )
    near = min(options, key=lambda size: math.dist(size, sides), default=None)
    return "leave size out" if near is None else f"size={format_image_size(near)} would fit"
