"""Training images with one caption each, out of shards.

Shapes: B batch, S side of the square image, F frames of a video.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.bad_samples import BadSample, TooManySkippedError, format_skip_counts
from ldm.data.image_decoding import (
    ImageError,
    crop_and_resize,
    pil_to_tensor,
    read_frames,
    read_image,
)
from ldm.data.position_sampler import draw_caption_number, draw_crop_and_flip
from ldm.data.shards.reader import Sample, ShardReader
from ldm.data.square_reading import read_square, resize_square

_MAX_TRIES = 10_000  # undecodable samples in a row
_READ_AHEAD = 16  # encoded samples in memory at a time


class TextImageItem(TypedDict):
    """One sample: images (3, S, S) uint8, and the other fields of a Batch in the singular."""

    images: Tensor
    captions: str
    position: int
    key: str
    skipped: list[BadSample]


class Batch(TypedDict):
    """images (B, 3, S, S), or videos (B, 3, F, S, S), uint8 in 0..255; B captions and keys.

    position: B integers that stay on the host, where they seed random numbers.
    skipped: the damaged samples that others of this batch replace.
    """

    images: Tensor
    captions: list[str]
    position: list[int]
    key: list[str]
    skipped: list[BadSample]


@dataclass(kw_only=True, eq=False)
class TextImageDataset(Dataset):
    """Square images with a caption, by (sample index, position).

    In training (seed, epoch, index) chooses the caption, (seed, position) crop and flip; otherwise
    each sample has its centre and first caption (of the heaviest key). The crop is the image's
    shorter side, scaled to `size`. even_crops: all positions of a random crop are equally likely,
    see `place_square`. fast_pixels: those of `read_square`, else of `crop_and_resize` (Pillow's
    resize, for numbers that are compared with others).
    frames: samples are animations, of which it takes so many frames, evenly; None: images.
    on_error: for a damaged image "stop" raises ImageError; "skip" uses the next sample (index + 1,
    + 2, .. modulo N) that can be decoded, or raises TooManySkippedError if none can.
    """

    shards: ShardReader = field(kw_only=False)
    size: int
    crop: Literal["center", "random"] = "center"
    flip: float = 0.0
    on_error: Literal["stop", "skip"] = "stop"
    frames: int | None = None
    seed: int
    train: bool
    even_crops: bool = True
    fast_pixels: bool = False
    tensor_name: ClassVar[str] = "images"  # of a batch's field that workers write into slots
    _damaged: dict[int, BadSample] = field(default_factory=dict, init=False)  # not tried again

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"the image size must be 1 pixel or more, got {self.size}")
        if self.crop not in ("center", "random"):
            raise ValueError(f"crop must be 'center' or 'random', got '{self.crop}'")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip is a probability, got {self.flip}")
        if self.on_error not in ("stop", "skip"):
            raise ValueError(f"on_error must be 'stop' or 'skip', got '{self.on_error}'")
        if self.frames is not None and self.frames < 2:
            raise ValueError(f"a video has 2 frames or more, got {self.frames}; null is for images")

    def without_augmentation(self, *, size: int | None = None) -> "TextImageDataset":
        """Returns the samples as evaluations read them: centre, first caption, Pillow's resize."""
        return replace(self, size=size or self.size, train=False, fast_pixels=False)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(3, S, S) of an image, or (3, F, S, S) of a video."""
        return (3, *([self.frames] if self.frames else []), self.size, self.size)

    @property
    def slot_shape(self) -> tuple[int, ...]:
        """The shape of one sample in a slot of bytes."""
        return self.image_shape

    def rules(self) -> dict[str, object]:
        """Returns what a checkpoint stores, so that the run resumes by the same rules."""
        source = self.shards.index.fingerprint
        return {
            "even_crops": self.even_crops,
            "fast_pixels": self.fast_pixels,
            "source": source,
            "cached": False,
        }

    def follow_rules(self, facts: Mapping[str, object]) -> None:
        """Takes the rules of a checkpoint; in those of before crops are uneven, Pillow resizes."""
        self.even_crops = facts.get("even_crops", False)
        self.fast_pixels = facts.get("fast_pixels", False)

    def unpack(self, batch: Batch) -> Batch:
        """Converts bytes on the device to (B, 3, S, S) or (B, 3, F, S, S) in [-1, 1]."""
        return {**batch, "images": batch["images"].float().div_(127.5).sub_(1)}

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, at: tuple[int, int]) -> TextImageItem:
        return self._read_items([at], torch.empty((1, *self.image_shape), dtype=torch.uint8))[0]

    def read_batch(self, at: Sequence[tuple[int, int]], images: Tensor | None = None) -> Batch:
        """Returns the samples at (index, position), decoded into `images` if they are given."""
        if images is None:
            images = torch.empty((len(at), *self.image_shape), dtype=torch.uint8)
        items = []
        for first in range(0, len(at), _READ_AHEAD):
            items += self._read_items(at[first : first + _READ_AHEAD], images[first:])
        return join_items(items, images[: len(at)])

    def _read_items(self, at: Sequence[tuple[int, int]], images: Tensor) -> list[TextImageItem]:
        # Each part of the work for all of them: its code then stays in the processor's cache.
        crops = [self._draw_crop(position) for _, position in at]
        samples = [None if i in self._damaged else self._read_sample(i, p) for i, p in at]
        return [
            self._decode_or_replace(*place, *crop, sample, out)
            for place, crop, sample, out in zip(at, crops, samples, images, strict=False)
        ]

    def _decode_or_replace(
        self, index: int, position: int, crop: dict, flip: bool, sample: Sample | None, out: Tensor
    ) -> TextImageItem:
        """Decodes this sample into `out`, or the next one that can be decoded."""
        problems: list[BadSample] = []
        for i in (n % len(self) for n in range(index, index + min(len(self), _MAX_TRIES))):
            problem = self._damaged.get(i)
            if problem is None:
                sample = sample if i == index else self._read_sample(i, position)
                problem = self._decode(i, sample.image, crop, flip, out)
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
        self, index: int, data: bytes, crop: dict, flip: bool, out: Tensor
    ) -> BadSample | None:
        parts = out.unbind(1) if self.frames else [out]
        try:
            for part, square in zip(parts, self._read_squares(data, crop), strict=True):
                part.copy_(square)
                if flip:
                    part.copy_(part.flip(-1))
        except ImageError as error:
            message = f"{self.shards.sample_name(index)}: {error}"
            if self.on_error != "skip":
                raise ImageError(message) from error
            self._damaged[index] = BadSample(error.reason, message)
            return self._damaged[index]
        return None

    def _draw_crop(self, position: int) -> tuple[dict, bool]:
        """Returns the arguments of `place_square`, and whether the image is flipped."""
        if not self.train:
            return {"x": 0.5, "y": 0.5, "even": False}, False
        x, y, flip = draw_crop_and_flip(self.seed, position)
        if self.crop != "random":
            x, y = 0.5, 0.5
        return {"x": x, "y": y, "even": self.crop == "random" and self.even_crops}, flip < self.flip

    def _read_sample(self, index: int, position: int) -> Sample:
        """Returns a sample with the caption of this position alone."""
        sample = self.shards.read(index)
        caption = self._choose_caption(sample, index, epoch=position // len(self))
        return Sample(sample.key, sample.image, [caption])

    def _read_squares(self, data: bytes, crop: dict) -> Iterator[Tensor]:
        """Yields the image or the frames, (3, S, S)."""
        if not self.fast_pixels:
            for frame in read_frames(data, self.frames) if self.frames else [read_image(data)]:
                yield pil_to_tensor(crop_and_resize(frame, self.size, **crop))
        elif not self.frames:
            yield read_square(data, self.size, **crop)
        else:
            for frame in read_frames(data, self.frames):
                yield resize_square(np.array(frame), self.size, **crop)

    def _choose_caption(self, sample: Sample, index: int, *, epoch: int) -> str:
        captions, draw = sample.captions, {"seed": self.seed, "epoch": epoch, "index": index}
        if not self.train:
            return captions[0]
        return captions[draw_caption_number(len(captions), sample.weights, **draw)]


def join_items(items: list[TextImageItem], images: Tensor) -> Batch:
    """Returns samples as a batch with these images."""
    return Batch(
        images=images,
        captions=[item["captions"] for item in items],
        position=[item["position"] for item in items],
        key=[item["key"] for item in items],
        skipped=[skip for item in items for skip in item["skipped"]],
    )
