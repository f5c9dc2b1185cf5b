"""Scores of the samples of shards: sizes of the pictures, CLIP similarity, near-duplicates.

Shapes: N samples, D features.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.data.image_decoding import ImageError, crop_and_resize, pil_to_tensor, read_image
from ldm.data.shards.reader import ShardReader
from ldm.evaluation.feature_table import tabulate
from ldm.evaluation.features.base import CaptionFeatures, FeatureExtractor
from ldm.evaluation.near_duplicates import PicturePair

SCORED_SIZE = 224  # pixels of the square that networks see
_SIZES, _CLIP, _FEATURES = "sizes", "clip", "features"


@dataclass(frozen=True)
class PictureTable:
    """sizes (N, 2): width and height, 0 for a picture that cannot be read; clip (N,): cosines of
    picture and first caption; features (N, D). None: not wanted.
    """

    sizes: Tensor
    clip: Tensor | None
    features: Tensor | None

    @property
    def readable(self) -> np.ndarray:
        return self.sizes[:, 0].numpy() > 0


def tabulate_pictures(
    shards: ShardReader,
    *,
    clip: CaptionFeatures | None = None,
    network: FeatureExtractor | None = None,
    batch: int,
    workers: int,
    device: torch.device,
    folder: Path,
    done: Callable[[range], None] = lambda items: None,
) -> PictureTable:
    """Returns what the networks say of each picture's centre, in the order of the shards.

    Batches are saved in `folder` and read from there. workers: threads that decode.
    """
    columns = {_SIZES: 2}
    columns |= {} if clip is None else {_CLIP: 1}
    columns |= {} if network is None else {_FEATURES: network.width}

    def read(data: bytes) -> tuple[tuple[int, int], Tensor]:
        try:
            image = read_image(data)
        except ImageError:
            return (0, 0), torch.zeros(3, SCORED_SIZE, SCORED_SIZE, dtype=torch.uint8)
        return image.size, pil_to_tensor(crop_and_resize(image, SCORED_SIZE))

    with ThreadPoolExecutor(workers) as pool:

        def make(items: range) -> Mapping[str, Tensor]:
            samples = [shards.read(i) for i in items]
            sizes, squares = zip(*pool.map(read, [one.image for one in samples]), strict=True)
            rows, images = {_SIZES: torch.tensor(sizes)}, torch.stack(squares).to(device)
            is_read = (rows[_SIZES][:, :1] > 0).to(device)
            if clip is not None:
                texts = clip.encode_texts([one.captions[0] for one in samples], device=device)
                cosines = (F.normalize(clip(images), dim=1) * texts).sum(1, keepdim=True)
                rows[_CLIP] = cosines * is_read
            if network is not None:
                rows[_FEATURES] = network(images) * is_read
            return rows

        tables = tabulate(len(shards), make, columns=columns, batch=batch, folder=folder, done=done)
    scores = tables[_CLIP][:, 0] if clip is not None else None
    return PictureTable(tables[_SIZES], scores, tables.get(_FEATURES))


def rank_in_groups(group: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Returns the rank (N,) of each picture in its group: 0 for the one with the most pixels."""
    order = np.lexsort([np.arange(len(group)), -pixels, group])
    firsts = np.flatnonzero(np.diff(group[order], prepend=-1))
    rank = np.empty(len(group), np.int64)
    rank[order] = np.arange(len(group)) - np.repeat(firsts, np.diff(firsts, append=len(group)))
    return rank


@dataclass(kw_only=True)
class SampleScores:
    """What is known of N samples; None for what was not computed.

    keys: of the samples; group, rank: see `group_near_duplicates` and `rank_in_groups`; pairs: the
    nearest pairs; threshold: the least cosine of near-duplicates. training_keys, similarity: of the
    nearest training picture.
    """

    keys: list[str]
    table: PictureTable
    threshold: float | None = None
    group: np.ndarray | None = None
    rank: np.ndarray | None = None
    pairs: Sequence[PicturePair] = ()
    training_keys: list[str] | None = None
    similarity: np.ndarray | None = None

    def list_fields(self) -> list[dict[str, Any]]:
        """Returns what the json of each sample gets; nothing for a picture that is unreadable."""
        rows: list[dict[str, Any]] = []
        for i, (width, height) in enumerate(self.table.sizes.int().tolist()):
            row: dict[str, Any] = {}
            if width:
                row |= {"width": width, "height": height, "aspect": round(width / height, 4)}
            if width and self.table.clip is not None:
                row["clip"] = round(float(self.table.clip[i]), 4)
            if width and self.group is not None:
                row |= {"duplicate_group": int(self.group[i]), "duplicate_rank": int(self.rank[i])}
            if width and self.similarity is not None:
                row["duplicate_of_training"] = bool(self.similarity[i] >= self.threshold)
                row["training_similarity"] = round(float(self.similarity[i]), 4)
                row["training_key"] = self.training_keys[i]
            rows.append(row)
        return rows

    def describe(self) -> dict[str, Any]:
        """Returns counts over all samples."""
        readable = self.table.readable
        unreadable = [self.keys[i] for i in np.flatnonzero(~readable)]
        report: dict[str, Any] = {"samples": len(readable), "unreadable": unreadable}
        if self.table.clip is not None and readable.any():
            scores = np.quantile(self.table.clip.numpy()[readable], [0, 0.1, 0.5, 0.9, 1]).tolist()
            names = ("least", "10 %", "median", "90 %", "most")
            report["clip"] = dict(zip(names, (round(one, 4) for one in scores), strict=True))
        if self.rank is not None:
            report["threshold"] = self.threshold
            report["duplicates"] = int((self.rank[readable] > 0).sum())
        if self.similarity is not None:
            close = self.similarity[readable] >= self.threshold
            report["duplicates_of_training"] = int(close.sum())
        return report

    def list_nearest_training(self, most: int) -> list[int]:
        """Returns the samples with the nearest training pictures, the nearest first."""
        order = np.argsort(-self.similarity, kind="stable")
        return order[self.table.readable[order]][:most].tolist()
