"""Samples in shards to training pictures and one caption each.

Shapes: B batch, S the side of the square picture, F frames of a video.
"""

from collections import Counter
from typing import Literal, TypedDict

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
from ldm.data.position_sampler import CAPTION_STREAM, CROP_STREAM, draw_random_bits
from ldm.data.shards.reader import ShardReader

_TRIES = 10_000  # undecodable samples in a row: nobody wants to wait for more


class TextImageItem(TypedDict):
    """One sample: images (3, S, S) uint8, and what else a Batch has, in the singular.

    skipped: none, or the sample that should have been here.
    """

    images: Tensor
    captions: str
    position: int
    key: str
    skipped: list[BadSample]


class Batch(TypedDict):
    """images (B, 3, S, S) uint8 in 0..255; captions and key, B texts; position, B plain numbers.

    Videos are images (B, 3, F, S, S).
    skipped: one for each sample of the batch that stands in for another, so mostly none.
    Positions seed random numbers, which the host does: they must not travel to the device.
    """

    images: Tensor
    captions: list[str]
    position: list[int]
    key: list[str]
    skipped: list[BadSample]


class TextImageDataset(Dataset):
    """Square pictures with a caption, by (sample index, position).

    In training the caption is drawn from (seed, epoch, index), crop and flip from
    (seed, position); otherwise each sample has its centre and its first caption. Every place of a
    random crop is as likely as any other, unless `even_crops` is off, as in runs begun before.
    A picture is cut to its shorter side first, then scaled to `size`, up or down.
    frames: samples are animations, of which so many frames are taken, evenly; None: pictures.
    on_error: where a picture is damaged, "stop" raises ImageError naming shard and key; "skip" puts
    the next sample (index + 1, + 2, .. modulo N) that can be decoded in its place, which depends on
    the data alone: all other positions, other ranks and resumed runs see what they would have seen.
    Raises ValueError for arguments out of range, TooManySkippedError where nothing can be decoded.
    """

    def __init__(
        self,
        shards: ShardReader,
        *,
        size: int,
        crop: Literal["center", "random"] = "center",
        flip: float = 0.0,
        on_error: Literal["stop", "skip"] = "stop",
        frames: int | None = None,
        seed: int,
        train: bool,
    ) -> None:
        if size < 1:
            raise ValueError(f"the picture size must be 1 pixel or more, got {size}")
        if crop not in ("center", "random"):
            raise ValueError(f"crop must be 'center' or 'random', got '{crop}'")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip is a probability, got {flip}")
        if on_error not in ("stop", "skip"):
            raise ValueError(f"on_error must be 'stop' or 'skip', got '{on_error}'")
        if frames is not None and frames < 2:
            raise ValueError(f"a video has 2 frames or more, got {frames}; null is for pictures")
        self.shards, self.frames = shards, frames
        self._skip = on_error == "skip"
        self._damaged: dict[int, BadSample] = {}  # found by this process; not decoded in vain again
        self._size, self._seed, self._train = size, seed, train
        self.even_crops = True
        self._random_crop, self._flip = train and crop == "random", flip if train else 0.0

    def plain(self, *, size: int | None = None) -> "TextImageDataset":
        """The same samples as a validation has them: centre and first caption.

        size: another side than here, in pixels.
        """
        on_error = "skip" if self._skip else "stop"
        same = {"size": size or self._size, "frames": self.frames, "seed": self._seed}
        return TextImageDataset(self.shards, **same, on_error=on_error, train=False)

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, at: tuple[int, int]) -> TextImageItem:
        index, position = at
        reasons = Counter()
        first: BadSample | None = None
        for used in range(index, index + min(len(self), _TRIES)):
            made = self._made(used % len(self), position)
            if not isinstance(made, BadSample):
                return {**made, "skipped": [first] if first else []}
            first = first or made
            reasons[made.reason] += 1
        raise TooManySkippedError(
            f"{first.message}; none of the {reasons.total()} samples from there on can be decoded "
            f"({format_skip_counts(reasons)})"
        )

    def _made(self, index: int, position: int) -> TextImageItem | BadSample:
        if index in self._damaged:
            return self._damaged[index]
        sample = self.shards.read(index)
        try:
            images = self._pixels(sample.image, position)
        except ImageError as error:
            message = f"{self.shards.name(index)}: {error}"
            if not self._skip:
                raise ImageError(message) from error
            return self._damaged.setdefault(index, BadSample(error.reason, message))
        captions = self._choose(sample.captions, index, epoch=position // len(self))
        return TextImageItem(
            images=images, captions=captions, position=position, key=sample.key, skipped=[]
        )

    def _pixels(self, data: bytes, position: int) -> Tensor:
        x, y, flip = draw_random_bits(3, CROP_STREAM, self._seed, position) / 2.0**64
        place = {"x": x, "y": y, "even": self.even_crops} if self._random_crop else {}
        seen = read_frames(data, self.frames) if self.frames else [read_image(data)]
        films = [pil_to_tensor(crop_and_resize(image, self._size, **place)) for image in seen]
        pixels = torch.stack(films, dim=1) if self.frames else films[0]
        return pixels.flip(-1) if flip < self._flip else pixels  # (3, S, S) or (3, F, S, S)

    def _choose(self, captions: list[str], index: int, *, epoch: int) -> str:
        if not self._train:
            return captions[0]
        return captions[
            int(draw_random_bits(1, CAPTION_STREAM, self._seed, epoch, index)[0] % len(captions))
        ]


def collate(items: list[TextImageItem]) -> Batch:
    """The samples as one batch."""
    return Batch(
        images=torch.stack([item["images"] for item in items]),
        captions=[item["captions"] for item in items],
        position=[item["position"] for item in items],
        key=[item["key"] for item in items],
        skipped=[skip for item in items for skip in item["skipped"]],
    )
