"""What a user gives a task, files and numbers, to what a pipeline takes.

Shapes: H W pixels of the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.images import read_image, read_mask, read_square, to_tensor
from ldm.pipeline import Pipeline


@dataclass(frozen=True)
class Given:
    """Pictures as a pipeline takes them: what it paints is `size`, and `shown` of it is the result.

    A network paints in multiples of its own grid, and in no less than it was trained on: a picture
    to be enlarged is continued to the right and below until it fits, and what comes of that is cut.
    """

    size: tuple[int, int]  # H, W
    image: Tensor | None = None  # (1 or N, 3, H / scale, W / scale) in [-1, 1]
    mask: Tensor | None = None  # (1, 1, H, W)
    shown: tuple[int, int] | None = None  # None: all of it

    def pictures(self) -> dict[str, Tensor]:
        """Those that there are, under the pipeline's names."""
        named = {"image": self.image, "mask": self.mask}
        return {name: part for name, part in named.items() if part is not None}

    def cut(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Painted pictures (3, H, W) without what was continued."""
        height, width = self.shown or self.size
        return [image[..., :height, :width] for image in images]


def read(
    pipeline: Pipeline,
    *,
    size: int,
    image: str | None = None,
    mask: str | None = None,
    pad: Sequence[int] = (0, 0, 0, 0),
) -> Given:
    """Files to a request: pictures of `size` pixels square, or, to enlarge them, of their own size.

    pad: pixels of the result to the left, above, right and below of the picture, to be painted
    anew; the picture gets what is left, cut to its shape from the middle.
    Raises ImageError for files that are no pictures, ValueError for what does not go together.
    """
    if image is None:
        if mask is not None or any(pad):
            raise ValueError("a mask, or pad, is for a picture: image=FILE")
        return Given((size, size))
    if pipeline.task.scale > 1:
        if mask is not None or any(pad):
            raise ValueError(f"task={pipeline.task.name} takes neither mask nor pad")
        return continued(pipeline, to_tensor(read_image(image)).float()[None] / 127.5 - 1)
    if any(pad):
        if mask is not None:
            raise ValueError("pad is a mask of its own: give either")
        inside, hidden = padded(image, size, pad)
        return Given((size, size), inside[None], hidden[None])
    hidden = None if mask is None else read_mask(mask, size, of=image)[None]
    return Given((size, size), read_square(image, size)[None], hidden)


def continued(pipeline: Pipeline, images: Tensor) -> Given:
    """Small pictures (N, 3, h, w) to be enlarged, as a pipeline takes them."""
    scale, factor = pipeline.task.scale, pipeline.autoencoder.factor
    least = pipeline.trained_size or 0
    shown = tuple(scale * side for side in images.shape[-2:])
    step = factor * scale  # both in whole pixels of the small picture
    size = tuple(-(-max(side, least) // step) * step for side in shown)
    more = [(full - side) // scale for full, side in zip(size, shown, strict=True)]
    whole = F.pad(images, (0, more[1], 0, more[0]), mode="replicate")
    return Given(size, whole, shown=shown)


def padded(file: str | Path, size: int, pad: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A picture inside a grey square (3, size, size), and the mask (1, size, size) of the rest.

    Raises ValueError for margins that are none, or leave no picture; ImageError as `read_image`.
    """
    if len(pad) != 4 or not all(isinstance(side, int) for side in pad):
        raise ValueError(f"pad={list(pad)} is four numbers of pixels: [left,above,right,below]")
    left, above, right, below = pad
    width, height = size - left - right, size - above - below
    if min(pad) < 0 or min(width, height) < 1:
        raise ValueError(
            f"pad=[{left},{above},{right},{below}] are pixels to the left, above, right and below "
            f"of a picture inside {size} x {size}: they leave {width} x {height}"
        )
    picture = read_image(file)
    share = min(picture.width / width, picture.height / height)  # its pixels for one of the result
    wide, high = share * width, share * height
    x, y = (picture.width - wide) / 2, (picture.height - high) / 2
    small = picture.resize((width, height), box=(x, y, x + wide, y + high), reducing_gap=2.0)
    rows, columns = slice(above, above + height), slice(left, left + width)
    canvas, mask = torch.zeros(3, size, size), torch.ones(1, size, size)
    canvas[:, rows, columns] = to_tensor(small).float() / 127.5 - 1
    mask[:, rows, columns] = 0
    return canvas, mask
