"""The images and captions that a cache is made of, read in batches of one size.

Shapes: B batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.bad_samples import BadSample
from ldm.data.cached.format import pack_record
from ldm.data.dataset import Batch, TextImageDataset
from ldm.data.image_decoding import ImageError
from ldm.utils.hashing import hash_bytes


@dataclass(frozen=True)
class SourceBatch:
    """Images (B, 3, h, w) uint8, None if B is 0, and the records of their samples by index.

    damaged: the samples that cannot be decoded, which are not among the B.
    """

    images: Tensor | None
    records: dict[int, dict[str, Any]]
    damaged: dict[int, BadSample]


@dataclass(frozen=True)
class CacheSource(Dataset):
    """Batches of samples by their indices, for a DataLoader whose sampler gives lists of them.

    images: reads them as validations during a training do, with `gives_sizes`. max_captions: the
    first of a sample are used; None: all.
    """

    images: TextImageDataset
    max_captions: int | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> SourceBatch:
        damaged: dict[int, BadSample] = {}
        try:
            batch = self._decode(indices)
        except ImageError:
            damaged = {i: bad for i in indices if (bad := self._find_damage(i))}
            indices = [i for i in indices if i not in damaged]
            batch = self._decode(indices) if indices else None
        if batch is None:
            return SourceBatch(None, {}, damaged)
        sizes = zip(indices, batch["sizes"].int().tolist(), strict=True)
        return SourceBatch(batch["images"], {i: self._describe(i, s) for i, s in sizes}, damaged)

    def key(self, index: int) -> str:
        """Returns the key of a sample, whose bytes may be no UTF-8."""
        return self.images.shards.index.key(index, errors="surrogateescape")

    def _decode(self, indices: Sequence[int]) -> Batch:
        return self.images.read_batch([(i, i) for i in indices])

    def _find_damage(self, index: int) -> BadSample | None:
        try:
            self._decode([index])
        except ImageError as error:
            cause = error.__cause__  # without the sample's name in its reason
            return BadSample(getattr(cause, "reason", error.reason), str(error))
        return None

    def _describe(self, index: int, sizes: list[int]) -> dict[str, Any]:
        shards, most = self.images.shards, self.max_captions
        sample = shards.read(index)
        return pack_record(
            shards.read_fields(index),
            captions=sample.captions[:most],
            weights=None if sample.weights is None else sample.weights[:most],
            digest=hash_bytes(sample.image),
            sizes=sizes,
        )
