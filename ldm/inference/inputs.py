"""What a user gives a task, files and numbers, to what a pipeline takes.

Shapes: H W pixels of the result.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.image_decoding import (
    ImageError,
    crop_and_resize,
    pil_to_tensor,
    read_image,
    read_mask,
    read_square_image,
)
from ldm.inference.pipeline import Pipeline, format_image_size


@dataclass(frozen=True)
class PipelineInputs:
    """Images as a pipeline takes them: it generates `size` and returns `output_size` of it.

    A network paints in multiples of its own grid, and in no less than it was trained on: a picture
    to be enlarged is continued to the right and below until it fits, and what comes of that is cut.
    """

    size: tuple[int, int]  # H, W
    image: Tensor | None = None  # (1 or N, 3, H / scale, W / scale) in [-1, 1]
    mask: Tensor | None = None  # (1, 1, H, W)
    output_size: tuple[int, int] | None = None  # None: all of it

    def pictures(self) -> dict[str, Tensor]:
        """Those that there are, under the pipeline's names."""
        named = {"image": self.image, "mask": self.mask}
        return {name: part for name, part in named.items() if part is not None}

    def cut(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Painted pictures (3, H, W) without what was continued."""
        height, width = self.output_size or self.size
        return [image[..., :height, :width] for image in images]


def read_pipeline_inputs(
    pipeline: Pipeline,
    *,
    trained: int,
    size: int | Sequence[int] | None = None,
    image: str | None = None,
    mask: str | None = None,
    pad: Sequence[int] = (0, 0, 0, 0),
) -> PipelineInputs:
    """Files to a request: pictures of `size`, or as `trained`; those to enlarge, of their own size.

    size: the result's side, or its height and width. pad: pixels of the result to the left, above,
    right and below of the picture, to be painted anew. Without `size` the picture is of `trained`
    pixels square, and the result that much larger.
    Raises ValueError for files that are no pictures, with the option's name, for sizes that the
    network cannot paint, and for what does not go together.
    """
    task = pipeline.task
    if image is None and (mask is not None or any(pad)):
        raise ValueError("a mask, or pad, is for a picture: image=FILE")
    if task.scale > 1:
        if mask is not None or any(pad) or size is not None:
            raise ValueError(
                f"task={task.name} takes neither mask nor pad nor size: the result is as large as "
                "task.scale says"
            )
        if image is None:
            raise ValueError(f"task={task.name} takes a small picture: image=FILE")
        with prefix_file_errors("image", image):
            return prepare_upscaling_inputs(
                pipeline, pil_to_tensor(read_image(image)).float()[None] / 127.5 - 1
            )
    if any(pad):
        if mask is not None:
            raise ValueError("pad is a mask of its own: give either")
        return prepare_outpainting_inputs(image, trained, size, pad, grid=pipeline.size_multiple)
    height, width = sides = parse_image_size(
        trained if size is None else size, pipeline.size_multiple
    )
    if image is None:
        return PipelineInputs(sides)
    if height != width:
        raise ValueError(
            f"size={format_image_size(sides)}: pictures are cut to squares, so give one number"
        )
    hidden = None
    if mask is not None:
        with prefix_file_errors("mask", mask):
            hidden = read_mask(mask, height, of=image)[None]
    return PipelineInputs(sides, read_square_option("image", image, height)[None], hidden)


def read_square_option(option: str, file: str, size: int) -> Tensor:
    """`read_square` of a file that was given as `option`; ValueError names both."""
    with prefix_file_errors(option, file):
        return read_square_image(file, size)


@contextmanager
def prefix_file_errors(option: str, file: str) -> Iterator[None]:
    """What is wrong with a file is told with the option that it was given by; ValueError."""
    try:
        yield
    except (OSError, ImageError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{option}={file}: {why}") from error


def parse_image_size(size: int | Sequence[int], grid: int) -> tuple[int, int]:
    """Height and width of which one number is both; ValueError unless they are multiples of grid.

    It names the next size that the network paints.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if any(side % grid for side in sides):
        next_ = format_image_size(tuple(-(-side // grid) * grid for side in sides))
        raise ValueError(
            f"size={format_image_size(sides)}: this run paints multiples of {grid}: size={next_}"
        )
    return sides


def prepare_upscaling_inputs(pipeline: Pipeline, images: Tensor) -> PipelineInputs:
    """Small pictures (N, 3, h, w) to be enlarged, as a pipeline takes them."""
    scale, factor = pipeline.task.scale, pipeline.autoencoder.factor
    least = pipeline.trained_size or 0
    shown = tuple(scale * side for side in images.shape[-2:])
    step = factor * scale  # both in whole pixels of the small picture
    size = tuple(-(-max(side, least) // step) * step for side in shown)
    more = [(full - side) // scale for full, side in zip(size, shown, strict=True)]
    whole = F.pad(images, (0, more[1], 0, more[0]), mode="replicate")
    return PipelineInputs(size, whole, output_size=shown)


def prepare_outpainting_inputs(
    file: str, trained: int, size: int | Sequence[int] | None, pad: Sequence[int], *, grid: int
) -> PipelineInputs:
    """A picture in the midst of grey, and the mask of the grey; as `read` says.

    Raises ValueError where the network cannot paint so large a picture, and where the picture has
    another shape than `size` and `pad` leave it.
    """
    left, above, right, below = pad
    with prefix_file_errors("image", file):
        picture = read_image(file)
    if size is None:
        picture = crop_and_resize(picture, trained)
        sides = (trained + above + below, trained + left + right)
        lacking = [-side % grid for side in sides]
        if any(lacking):
            would = f"[{left},{above},{right + lacking[1]},{below + lacking[0]}]"
            raise ValueError(
                f"pad=[{left},{above},{right},{below}] makes {sides[1]} x {sides[0]} pixels, and "
                f"this run paints multiples of {grid}: pad={would}"
            )
    else:
        sides = parse_image_size(size, grid)
        room = (sides[1] - left - right, sides[0] - above - below)  # width, height
        if not matches_aspect_ratio(picture.size, room):
            raise ValueError(
                f"size={format_image_size(sides)} and pad leave {room[0]} x {room[1]} pixels "
                "for a picture of "
                f"{picture.width} x {picture.height}: "
                f"{suggest_image_size(picture.size, sides, pad, grid)}"
            )
        picture = picture.resize(room, reducing_gap=2.0)
    inside = pil_to_tensor(picture).float() / 127.5 - 1  # (3, h, w)
    around = (left, right, above, below)
    mask = F.pad(torch.zeros_like(inside[:1]), around, value=1.0)
    return PipelineInputs(sides, F.pad(inside, around)[None], mask[None])


def matches_aspect_ratio(picture: tuple[int, int], room: tuple[int, int]) -> bool:
    """Whether a picture fills a room, widths and heights, to less than a pixel."""
    return min(room) > 0 and abs(picture[0] * room[1] / picture[1] - room[0]) < 1


def suggest_image_size(
    picture: tuple[int, int], sides: tuple[int, int], pad: Sequence[int], grid: int
) -> str:
    """The size, nearest to `sides`, in which pad leaves a picture, width and height, its shape."""
    left, above, right, below = pad
    there_are = (
        (height, width)
        for height in range(grid, 2 * max(sides) + 1, grid)
        for width in range(grid, 2 * max(sides) + 1, grid)
        if matches_aspect_ratio(picture, (width - left - right, height - above - below))
    )
    near = min(there_are, key=lambda found: math.dist(found, sides), default=None)
    return "leave size out" if near is None else f"size={format_image_size(near)} would fit"
