"""Training images with one caption each, out of shards.

Shapes: B batch, h w height and width of its images, F frames of a video.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import ClassVar, Literal, NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.bad_samples import BadSample, TooManySkippedError, format_skip_counts
from ldm.data.box_reading import read_box, resize_box
from ldm.data.image_decoding import (
    ImageError,
    TargetSize,
    crop_and_resize,
    describe_crop,
    get_sides,
    pil_to_tensor,
    read_frames,
    read_image,
)
from ldm.data.position_sampler import draw_caption_number, draw_crop_and_flip
from ldm.data.shards.reader import Sample, ShardReader

_MAX_TRIES = 10_000  # undecodable samples in a row
_READ_AHEAD = 16  # encoded samples in memory at a time


class TextImageItem(TypedDict):
    """One sample: images (3, h, w) uint8, and the other fields of a Batch in the singular."""

    images: Tensor
    captions: str
    position: int
    key: str
    skipped: list[BadSample]


class Batch(TypedDict):
    """images (B, 3, h, w), or videos (B, 3, F, h, w), uint8 in 0..255; B captions and keys.

    position: B integers that stay on the host, where they seed random numbers.
    skipped: the damaged samples that others of this batch replace.
    sizes (B, 6), int32: `Condition.sizes`, for networks that take them.
    """

    images: Tensor
    captions: list[str]
    position: list[int]
    key: list[str]
    skipped: list[BadSample]
    sizes: NotRequired[Tensor]


class Crop(NamedTuple):
    """The arguments of `crop_and_resize`, and whether the result is turned left to right."""

    box: dict
    flip: bool


@dataclass(kw_only=True, eq=False)
class TextImageDataset(Dataset):
    """Images with a caption, by (sample index, position).

    In training (seed, epoch, index) chooses the caption, (seed, position) crop and flip; otherwise
    each sample has its centre and first caption (of the heaviest key). The crop is the largest box
    of the aspect of `size`, scaled to it. target_sizes (N, 2): height and width of each sample, in
    place of `size`; all samples of a batch must have one. even_crops: all positions of a random
    crop are equally likely, see `find_crop_box`. fast_pixels: those of `read_box`, else of
    `crop_and_resize` (Pillow's resize, for numbers that are compared with others).
    gives_sizes: batches have `sizes`. epoch_length: positions of an epoch; None: N.
    frames: samples are animations, of which it takes so many frames, evenly; None: images.
    on_error: for a damaged image "stop" raises ImageError; "skip" uses the next sample of its size
    (index + 1, + 2, .. modulo N) that can be decoded, or raises TooManySkippedError if none can.
    """

    shards: ShardReader = field(kw_only=False)
    size: TargetSize
    target_sizes: np.ndarray | None = None
    crop: Literal["center", "random"] = "center"
    flip: float = 0.0
    on_error: Literal["stop", "skip"] = "stop"
    frames: int | None = None
    seed: int
    train: bool
    even_crops: bool = True
    fast_pixels: bool = False
    gives_sizes: bool = False
    epoch_length: int | None = None
    tensor_name: ClassVar[str] = "images"  # of a batch's field that workers write into slots
    _damaged: dict[int, BadSample] = field(default_factory=dict, init=False)  # not tried again

    def __post_init__(self) -> None:
        if min(get_sides(self.size)) < 1:
            raise ValueError(f"the image size must be 1 pixel or more, got {self.size}")
        if self.crop not in ("center", "random"):
            raise ValueError(f"crop must be 'center' or 'random', got '{self.crop}'")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip is a probability, got {self.flip}")
        if self.on_error not in ("stop", "skip"):
            raise ValueError(f"on_error must be 'stop' or 'skip', got '{self.on_error}'")
        if self.frames is not None and self.frames < 2:
            raise ValueError(f"a video has 2 frames or more, got {self.frames}; null is for images")

    def without_augmentation(self, *, size: TargetSize | None = None) -> "TextImageDataset":
        """Returns the samples as evaluations read them: centre, first caption, Pillow's resize.

        All of them have one size.
        """
        how = {"train": False, "fast_pixels": False, "gives_sizes": False}
        return replace(self, size=size or self.size, target_sizes=None, **how)

    def size_at(self, index: int) -> TargetSize:
        """Returns the size of a sample."""
        if self.target_sizes is None:
            return self.size
        height, width = self.target_sizes[index]
        return int(height), int(width)

    @property
    def most_bytes(self) -> int:
        """The bytes of the largest sample."""
        sizes = [get_sides(self.size)] if self.target_sizes is None else self.target_sizes
        return 3 * (self.frames or 1) * int(np.prod(sizes, axis=1).max())

    def rules(self) -> dict[str, object]:
        """Returns what a checkpoint stores, so that the run resumes by the same rules."""
        source = self.shards.index.fingerprint
        return {
            "even_crops": self.even_crops,
            "fast_pixels": self.fast_pixels,
            "sizes": self.gives_sizes,
            "source": source,
            "cached": False,
        }

    def follow_rules(self, facts: Mapping[str, object]) -> None:
        """Takes the rules of a checkpoint; those of before: uneven crops, Pillow, no `sizes`."""
        self.even_crops = facts.get("even_crops", False)
        self.fast_pixels = facts.get("fast_pixels", False)
        self.gives_sizes = self.gives_sizes and facts.get("sizes", False)

    def unpack(self, batch: Batch) -> Batch:
        """Converts bytes on the device to (B, 3, h, w) or (B, 3, F, h, w) in [-1, 1]."""
        return {**batch, "images": batch["images"].float().div_(127.5).sub_(1)}

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, at: tuple[int, int]) -> TextImageItem:
        images = torch.empty((1, *self._shape_at(at[0])), dtype=torch.uint8)
        return self._read_items([at], images, make_empty_sizes(1))[0]

    def read_batch(self, at: Sequence[tuple[int, int]], memory: Tensor | None = None) -> Batch:
        """Returns the samples at (index, position), decoded into bytes of `memory` if given."""
        size, shape = self.size_at(at[0][0]), (len(at), *self._shape_at(at[0][0]))
        if self.target_sizes is not None and any(self.size_at(i) != size for i, _ in at):
            raise ValueError(f"the images of a batch have one size: not all are {size}")
        if memory is None:
            memory = torch.empty(prod(shape), dtype=torch.uint8)
        images, sizes = memory[: prod(shape)].view(shape), make_empty_sizes(len(at))
        items = []
        for n in range(0, len(at), _READ_AHEAD):
            items += self._read_items(at[n : n + _READ_AHEAD], images[n:], sizes[n:])
        return join_items(items, images, **({"sizes": sizes} if self.gives_sizes else {}))

    def _shape_at(self, index: int) -> tuple[int, ...]:
        """(3, h, w) of an image, or (3, F, h, w) of a video."""
        frames = [self.frames] if self.frames else []
        return (3, *frames, *get_sides(self.size_at(index)))

    def _read_items(
        self, at: Sequence[tuple[int, int]], images: Tensor, sizes: Tensor
    ) -> list[TextImageItem]:
        # Each part of the work for all of them: its code then stays in the processor's cache.
        crops = [self._draw_crop(*place) for place in at]
        samples = [None if i in self._damaged else self._read_sample(i, p) for i, p in at]
        return [
            self._decode_or_replace(*place, crop, sample, *out)
            for place, crop, sample, *out in zip(at, crops, samples, images, sizes, strict=False)
        ]

    def _decode_or_replace(
        self,
        index: int,
        position: int,
        crop: Crop,
        sample: Sample | None,
        out: Tensor,
        sizes: Tensor,
    ) -> TextImageItem:
        """Decodes this sample into `out`, or the next one that can be decoded."""
        problems: list[BadSample] = []
        for i in (n % len(self) for n in range(index, index + min(len(self), _MAX_TRIES))):
            if self.size_at(i) != crop.box["size"]:
                continue
            problem = self._damaged.get(i)
            if problem is None:
                sample = sample if i == index else self._read_sample(i, position)
                problem = self._decode(i, sample.image, crop, out, sizes)
            if problem is None:
                return TextImageItem(
                    images=out,
                    captions=sample.captions[0],
                    position=position,
                    key=sample.key,
                    skipped=problems[:1],
                )
            problems.append(problem)
        reasons = format_skip_counts(Counter(problem.reason for problem in problems))
        raise TooManySkippedError(
            f"{problems[0].message}; none of the {len(problems)} samples from there on can be "
            f"decoded ({reasons})"
        )

    def _decode(
        self, index: int, data: bytes, crop: Crop, out: Tensor, sizes: Tensor
    ) -> BadSample | None:
        parts = out.unbind(1) if self.frames else [out]
        try:
            for part, (box, sides) in zip(parts, self._read_boxes(data, crop.box), strict=True):
                part.copy_(box)
                if crop.flip:
                    part.copy_(part.flip(-1))
                if self.gives_sizes:
                    sizes.copy_(torch.tensor(describe_crop(*sides, **crop.box, flip=crop.flip)))
        except ImageError as error:
            message = f"{self.shards.sample_name(index)}: {error}"
            if self.on_error != "skip":
                raise ImageError(message) from error
            self._damaged[index] = BadSample(error.reason, message)
            return self._damaged[index]
        return None

    def _draw_crop(self, index: int, position: int) -> Crop:
        box = {"size": self.size_at(index), "x": 0.5, "y": 0.5, "even": False}
        if not self.train:
            return Crop(box, flip=False)
        x, y, flip = draw_crop_and_flip(self.seed, position)
        if self.crop == "random":
            box |= {"x": x, "y": y, "even": self.even_crops}
        return Crop(box, flip=flip < self.flip)

    def _read_sample(self, index: int, position: int) -> Sample:
        """Returns a sample with the caption of this position alone."""
        sample = self.shards.read(index)
        epoch = position // (self.epoch_length or len(self))
        caption = self._choose_caption(sample, index, epoch=epoch)
        return Sample(sample.key, sample.image, [caption])

    def _read_boxes(self, data: bytes, box: dict) -> Iterator[tuple[Tensor, tuple[int, int]]]:
        """Yields the image or the frames, (3, h, w), each with width and height in the file."""
        if self.fast_pixels and not self.frames:
            yield read_box(data, **box)
            return
        for frame in read_frames(data, self.frames) if self.frames else [read_image(data)]:
            if self.fast_pixels:
                yield resize_box(np.array(frame), **box), frame.size
            else:
                yield pil_to_tensor(crop_and_resize(frame, **box)), frame.size

    def _choose_caption(self, sample: Sample, index: int, *, epoch: int) -> str:
        captions, draw = sample.captions, {"seed": self.seed, "epoch": epoch, "index": index}
        if not self.train:
            return captions[0]
        return captions[draw_caption_number(len(captions), sample.weights, **draw)]


def make_empty_sizes(n: int) -> Tensor:
    """Returns room for the `sizes` of n samples."""
    return torch.empty((n, 6), dtype=torch.int32)


def join_items(items: list[TextImageItem], images: Tensor, **more: Tensor) -> Batch:
    """Returns samples as a batch with these images."""
    return Batch(
        images=images,
        captions=[item["captions"] for item in items],
        position=[item["position"] for item in items],
        key=[item["key"] for item in items],
        skipped=[skip for item in items for skip in item["skipped"]],
        **more,
    )
