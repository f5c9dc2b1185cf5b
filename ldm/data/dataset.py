"""Samples in shards to training pictures and one caption each.

Shapes: B batch, S the side of the square picture.
"""

from typing import Literal, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.images import ImageError, crop, read_image, resize_short, to_tensor
from ldm.data.order import CAPTION, CROP, draws
from ldm.data.shards import Shards


class Item(TypedDict):
    """One sample: images (3, S, S) uint8, and what else a Batch has, in the singular."""

    images: Tensor
    captions: str
    position: int
    key: str


class Batch(TypedDict):
    """images (B, 3, S, S) uint8 in 0..255; captions and key, B texts; position, B plain numbers.

    Positions seed random numbers, which the host does: they must not travel to the device.
    """

    images: Tensor
    captions: list[str]
    position: list[int]
    key: list[str]


class TextImages(Dataset):
    """Square pictures with a caption, by (sample index, position).

    In training the caption is drawn from (seed, epoch, index), crop and flip from
    (seed, position); otherwise each sample has its centre and its first caption.
    A picture is cut to its shorter side first, then scaled to `size`, up or down.
    Raises ValueError for arguments out of range, ImageError naming shard and key where a picture
    is damaged.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        size: int,
        crop: Literal["center", "random"] = "center",
        flip: float = 0.0,
        seed: int,
        train: bool,
    ) -> None:
        if size < 1:
            raise ValueError(f"the picture size must be 1 pixel or more, got {size}")
        if crop not in ("center", "random"):
            raise ValueError(f"crop must be 'center' or 'random', got '{crop}'")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip is a probability, got {flip}")
        self.shards = shards
        self._size, self._seed, self._train = size, seed, train
        self._random_crop, self._flip = train and crop == "random", flip if train else 0.0

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, at: tuple[int, int]) -> Item:
        index, position = at
        sample = self.shards.read(index)
        try:
            images = self._pixels(sample.image, position)
        except ImageError as error:
            raise ImageError(f"{self.shards.name(index)}: {error}") from error
        captions = self._choose(sample.captions, index, epoch=position // len(self))
        return Item(images=images, captions=captions, position=position, key=sample.key)

    def _pixels(self, data: bytes, position: int) -> Tensor:
        x, y, flip = draws(3, CROP, self._seed, position) / 2.0**64
        if not self._random_crop:
            x = y = 0.5
        image = read_image(data)
        # Cut before scaling: scaling up a picture of 1 x 20000 pixels would take gigabytes.
        pixels = to_tensor(resize_short(crop(image, min(image.size), x=x, y=y), self._size))
        return pixels.flip(-1) if flip < self._flip else pixels  # (3, S, S)

    def _choose(self, captions: list[str], index: int, *, epoch: int) -> str:
        if not self._train:
            return captions[0]
        return captions[int(draws(1, CAPTION, self._seed, epoch, index)[0] % len(captions))]


def collate(items: list[Item]) -> Batch:
    """The samples as one batch."""
    return Batch(
        images=torch.stack([item["images"] for item in items]),
        captions=[item["captions"] for item in items],
        position=[item["position"] for item in items],
        key=[item["key"] for item in items],
    )
