"""Cached latents and text states as samples of a training, out of the shards of a cache.

Shapes: B batch, C latent channels, h w latent grid, L tokens, D text width, P pooled width, R bytes
of a sample.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.bad_samples import BadSample, TooManySkippedError, format_skip_counts
from ldm.data.cached.format import MAX_LAYOUT_BYTES, TensorPart, read_layout
from ldm.data.cached.manifest import TEXT_PARTS, CacheError, Manifest
from ldm.data.cached.rows import CopyPlan, lay_out_row, parse_cached_record, plan_copy
from ldm.data.dataset import TextImageDataset
from ldm.data.image_decoding import describe_crop
from ldm.data.position_sampler import draw_caption_number, draw_crop_and_flip
from ldm.data.shards.reader import ShardReader

DAMAGED = "damaged cached sample"
_MAX_TRIES = 10_000  # damaged samples in a row
_MAX_PLANS = 4096  # layouts of files, by caption and flip, that are known at a time
# The bits of a number's exponent, which are all 1 in NaN and infinity.
_EXPONENTS = {"bf16": np.uint16(0x7F80), "float16": np.uint16(0x7C00)}
_EXPONENTS["float32"] = np.uint32(0x7F800000)


class CachedItem(NamedTuple):
    """What a sample has besides its row of bytes; skipped: what it replaces."""

    caption: str
    position: int
    key: str
    skipped: list[BadSample]
    sizes: Sequence[int]


class CachedBatch(TypedDict, total=False):
    """rows (B, R) uint8 of latents on a grid (h, w); the other fields as in `Batch`.

    `unpack` puts in place of `rows`: moments, mean and log-variance (B, C, h, w) or None, unscaled;
    condition: tokens (B, L, D), mask (B, L) bool and pooled (B, P), as far as there are any.
    """

    rows: Tensor
    grid: tuple[int, int]
    captions: list[str]
    position: list[int]
    key: list[str]
    skipped: list[BadSample]
    sizes: Tensor
    moments: tuple[Tensor, Tensor | None]
    condition: dict[str, Tensor]


@dataclass(kw_only=True, eq=False)
class CachedDataset(Dataset):
    """Latents and the text states of one caption, by (sample index, position).

    Caption and flip are drawn as by `TextImageDataset`, from the captions of the cache; all samples
    of a batch have one size. flip: needs a cache with flips. images: real images of the same kind
    for evaluations; None: there are none here. epoch_length: see `TextImageDataset`.
    on_error: for a damaged sample "stop" raises CacheError, "skip" uses the next sound one of the
    batch's size, or raises TooManySkippedError if there is none.
    """

    shards: ShardReader = field(kw_only=False)
    manifest: Manifest
    seed: int
    train: bool
    flip: float = 0.0
    on_error: Literal["stop", "skip"] = "stop"
    images: TextImageDataset | None = None
    gives_sizes: bool = False
    epoch_length: int | None = None
    tensor_name: ClassVar[str] = "rows"
    _damaged: dict[int, BadSample] = field(default_factory=dict, init=False)  # not tried again
    _plans: dict[tuple, CopyPlan] = field(default_factory=dict, init=False)
    _head: int = field(default=2048, init=False)  # bytes that hold the header of a sample's file

    def __post_init__(self) -> None:
        manifest = self.manifest
        if self.flip and not manifest.flips:
            raise ValueError(
                f"data.flip={self.flip}: the cache has no latents of flipped images: make it with "
                "`ldm cache flips=true`, or give data.flip=0"
            )
        # Without the filters, which leave samples out of the index.
        if (count := self.shards.index.captions.samples) != manifest.samples:
            raise CacheError(
                f"the cache has {count} samples, and {manifest.samples} were written: "
                "its shards were changed, make it again"
            )
        self._exponent, self._count = _EXPONENTS[manifest.dtype], len(self.shards)

    @cached_property
    def target_sizes(self) -> np.ndarray | None:
        """Height and width (N, 2) of the image of each sample; None: all have the same.

        A damaged sample, of a size that is none of the cache's, counts as one of the first size.
        """
        if self.manifest.buckets is None:
            return None
        sizes = self.shards.index.sizes
        sizes = np.zeros((self._count, 2), np.int32) if sizes is None else sizes.copy()
        known = [(sizes == size).all(axis=1) for size in self.manifest.image_sizes]
        sizes[~np.logical_or.reduce(known)] = self.manifest.image_sizes[0]
        return sizes[:, ::-1]

    @property
    def most_bytes(self) -> int:
        """R of the largest size."""
        factor = self.manifest.factor
        grids = [(height // factor, width // factor) for width, height in self.manifest.image_sizes]
        return max(lay_out_row(self.manifest, grid).size for grid in grids)

    def __len__(self) -> int:
        return self._count

    def rules(self) -> dict[str, object]:
        """Returns what a checkpoint stores, so that the run resumes on latents of these images."""
        return {"source": self.manifest.source, "cached": True, "sizes": self.gives_sizes}

    def follow_rules(self, facts: Mapping[str, object]) -> None:
        """Takes the rules of a checkpoint; those of before: no `sizes`."""
        self.gives_sizes = self.gives_sizes and facts.get("sizes", False)

    def without_augmentation(self) -> TextImageDataset:
        """Returns the real images as evaluations read them; ValueError where there are none."""
        if self.images is None:
            raise ValueError(
                "eval.images compares with real images, and a cache has none: give "
                "data.train_images=SHARDS data.val_images=SHARDS, those that it was made of, or "
                "eval=none"
            )
        return self.images.without_augmentation()

    def read_batch(
        self, at: Sequence[tuple[int, int]], memory: Tensor | None = None
    ) -> CachedBatch:
        """Returns the samples at (index, position), in rows of `memory` if it is given."""
        grid = self._find_grid(at[0][0])
        size = lay_out_row(self.manifest, grid).size
        if memory is None:
            memory = torch.empty(len(at) * size, dtype=torch.uint8)
        rows = memory[: len(at) * size].view(len(at), size)
        items = [
            self._read_or_replace(*place, grid, row)
            for place, row in zip(at, rows.numpy(), strict=True)
        ]
        captions, position, key, skipped, sizes = map(list, zip(*items, strict=True))
        more = {"sizes": torch.tensor(sizes, dtype=torch.int32)} if self.gives_sizes else {}
        return CachedBatch(
            rows=rows,
            grid=grid,
            captions=captions,
            position=position,
            key=key,
            skipped=[problem for problems in skipped for problem in problems],
            **more,
        )

    def unpack(self, batch: CachedBatch) -> CachedBatch:
        """Takes the tensors of a batch out of its bytes, on their device, as float32."""
        rows = batch["rows"]

        def take(name: str, part: TensorPart) -> Tensor:
            cells = rows[:, part.start : part.end].view(part.dtype).unflatten(1, part.shape)
            return cells != 0 if name == "mask" else cells.float().contiguous()

        parts = lay_out_row(self.manifest, batch["grid"]).parts
        tensors = {name: take(name, part) for name, part in parts.items()}
        moments = tensors["mean"], tensors.get("logvar")
        condition = {name: tensors[name] for name in TEXT_PARTS if name in tensors}
        others = {name: value for name, value in batch.items() if name != "rows"}
        return CachedBatch(**others, moments=moments, condition=condition)

    def _read_or_replace(
        self, index: int, position: int, grid: tuple[int, int], row: np.ndarray
    ) -> CachedItem:
        """Reads this sample into its row, or the next sound one of the same grid."""
        count, flip = self._count, self._draw_flip(position)
        epoch = position // (self.epoch_length or count)
        problems: list[BadSample] = []
        for i in range(index, index + min(count, _MAX_TRIES)):
            i %= count
            if i != index and self._find_grid(i) != grid:
                continue
            problem = self._damaged.get(i)
            if problem is None:
                try:
                    caption, sizes = self._read(i, epoch, flip, grid, row)
                    key = self.shards.index.key(i)
                    return CachedItem(caption, position, key, problems[:1], sizes)
                except CacheError as error:
                    problem = self._note_damage(i, error)
            problems.append(problem)
        reasons = format_skip_counts(Counter(problem.reason for problem in problems))
        raise TooManySkippedError(
            f"{problems[0].message}; none of the {len(problems)} samples from there on can be "
            f"read ({reasons})"
        )

    def _note_damage(self, i: int, error: CacheError) -> BadSample:
        """Returns what is wrong with a sample; CacheError unless damaged ones are skipped."""
        problem = BadSample(DAMAGED, f"{self.shards.sample_name(i)} {error}")
        if self.on_error != "skip":
            raise CacheError(
                f"{problem.message}: make the cache again, or leave such samples out with "
                "data.on_error=skip"
            ) from error
        self._damaged[i] = problem
        return problem

    def _read(
        self, i: int, epoch: int, flip: bool, grid: tuple[int, int], row: np.ndarray
    ) -> tuple[str, Sequence[int]]:
        """Reads a sample into its row; returns caption and sizes; CacheError if it is damaged."""
        file, ((start, size), _, (record_start, record_size)) = self.shards.open_sample(i)
        record = parse_cached_record(os.pread(file, record_size, record_start))
        captions, number = record["captions"], 0
        if self.train:
            draw = {"seed": self.seed, "epoch": epoch, "index": i}
            number = draw_caption_number(len(captions), record.get("caption_weights"), **draw)
        head = os.pread(file, min(self._head, size), start)
        if len(head) < (needed := 8 + int.from_bytes(head[:8], "little")) <= MAX_LAYOUT_BYTES:
            self._head = needed
            head = os.pread(file, min(needed, size), start)
        layout = read_layout(head)
        if layout.size != size:
            raise CacheError(f"has {size} bytes, where its header says {layout.size}")
        plan = self._plans.get((id(layout), len(captions), number, flip, grid))
        if plan is None or plan.layout is not layout:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            how = {"captions": len(captions), "number": number, "flip": flip, "grid": grid}
            plan = plan_copy(layout, self.manifest, **how)
            self._plans[id(layout), len(captions), number, flip, grid] = plan
        for begin, end, at in plan.pieces:
            if os.preadv(file, [row[at : at + end - begin]], start + begin) != end - begin:
                raise CacheError("was cut short while in use")
        numbers = row[: plan.numbers].view(self._exponent.dtype)
        if np.maximum.reduce(numbers & self._exponent) == self._exponent:
            raise CacheError("has NaN or infinity in it")
        sizes = record["sizes"]
        if flip:  # the left side of the crop is then that of the turned image
            height, width, *_, h, w = sizes
            sizes = describe_crop(width, height, (h, w), x=0.5, y=0.5, flip=True)
        return captions[number], sizes

    def _find_grid(self, i: int) -> tuple[int, int]:
        """Returns h and w of a sample."""
        manifest = self.manifest
        if self.target_sizes is None:
            return (manifest.size // manifest.factor,) * 2
        height, width = self.target_sizes[i].tolist()
        return height // manifest.factor, width // manifest.factor

    def _draw_flip(self, position: int) -> bool:
        if not self.train or not self.flip:
            return False
        return draw_crop_and_flip(self.seed, position)[2] < self.flip
