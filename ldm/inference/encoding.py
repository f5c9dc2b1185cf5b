"""Images and captions to the tensors of a cache, see `ldm.data.cached`.

Shapes: B batch, C latent channels, n captions of a sample, L tokens, D width, P pooled width.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ldm.data.bad_samples import BadSample
from ldm.data.batch_slots import PREFETCH, pass_batch
from ldm.data.cached.format import DTYPE_BY_NAME, RECORD_SUFFIX, check_finite, pack_sample
from ldm.data.cached.manifest import LATENT_PARTS, CacheError, Manifest
from ldm.data.cached.source import CacheSource, SourceBatch
from ldm.data.cached.writer import CacheShard
from ldm.data.image_decoding import ImageError
from ldm.data.shards.tar_headers import MAX_TEXT_BYTES
from ldm.models.base import TextEncoder
from ldm.utils.signals import block_stop_signals, stop_with_parent
from ldm.utils.transfer import send

# On a CPU the results of an image are the same bits in any batch of so many or more.
MIN_BATCH = 16
FINITE_REMEDY = "give dtype=bf16, which has the range of float32, or precision=float32"
WINDOW = 1024  # samples that are sorted by size and held in memory
TEXT_WINDOW = 128  # samples whose captions are encoded together
MAX_STATES_BYTES = 2**28  # of captions that are not encoded twice


@dataclass(frozen=True)
class CacheEncoder:
    """Encodes batches with the frozen components of a training, as the manifest says.

    posterior: images to mean and log-variance, the latter None where there is none.
    batch: the most images or captions of one call; with the micro-batch of a training, its latents
    are the same bits also where a device's results depend on the batch.
    """

    posterior: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    text_encoder: TextEncoder
    manifest: Manifest
    device: torch.device
    batch: int

    @torch.inference_mode()
    def encode_images(self, images: Tensor) -> dict[str, Tensor]:
        """Returns the latents (B, C, h, w) of uint8 images (B, 3, H, W), by their names."""
        count = len(images)
        images = send(self._pad(images), self.device).float().div_(127.5).sub_(1)
        found = dict.fromkeys(LATENT_PARTS)
        with self._autocast():
            found["mean"], found["logvar"] = self.posterior(images)
            if self.manifest.flips:
                flipped = self.posterior(images.flip(-1))
                found["mean_flipped"], found["logvar_flipped"] = flipped
        return {name: self._store(found[name][:count]) for name in self.manifest.latent_parts}

    @torch.inference_mode()
    def encode_captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Returns tokens (B, L, D), mask (B, L), pooled (B, P), those that there are."""
        missing = min(MIN_BATCH, self.batch) - len(captions)
        with self._autocast():
            cond = self.text_encoder([*captions, *[""] * missing])
        parts = {name: getattr(cond, name) for name in self.manifest.text_parts}
        return {name: self._store(part[: len(captions)]) for name, part in parts.items()}

    def encode_null(self) -> dict[str, Tensor]:
        """Returns the parts (1, ..) of the null condition."""
        with self._autocast():
            null = self.text_encoder.null(1)
        return {name: self._store(getattr(null, name)) for name in self.manifest.text_parts}

    def _pad(self, images: Tensor) -> Tensor:
        missing = min(MIN_BATCH, self.batch) - len(images)
        return torch.cat([images, *[images[-1:]] * missing]) if missing > 0 else images

    def _autocast(self) -> AbstractContextManager:
        dtype = getattr(torch, self.manifest.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not torch.float32)

    def _store(self, part: Tensor) -> Tensor:
        if part.dtype is torch.bool:
            return part.to(torch.uint8).cpu()
        return part.detach().to(DTYPE_BY_NAME[self.manifest.dtype]).cpu()


class CaptionStates:
    """The text states of captions, each of which is encoded once as far as memory allows."""

    def __init__(self, encoder: CacheEncoder) -> None:
        self.encoder = encoder
        self._rows: dict[str, tuple[Tensor, ...]] = {}
        self._bytes = 0

    def add(self, captions: Iterable[str]) -> None:
        """Encodes the captions that are not here; forgets others if they are many."""
        if not self.encoder.manifest.text_parts:
            return
        if self._bytes > MAX_STATES_BYTES:
            self._rows, self._bytes = {}, 0
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._rows]
        for first in range(0, len(new), self.encoder.batch):
            part = new[first : first + self.encoder.batch]
            encoded = self.encoder.encode_captions(part)
            try:
                check_finite(encoded)
            except CacheError as error:
                raise CacheError(
                    f"{part[0]!r} or a later caption {error}: {FINITE_REMEDY}"
                ) from error
            states = encoded.values()
            self._bytes += sum(state.nbytes for state in states)
            rows = zip(*(state.split(1) for state in states), strict=True)
            self._rows.update(zip(part, rows, strict=True))

    def stack(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Returns the parts (n, ..) of captions that `add` has encoded."""
        names = self.encoder.manifest.text_parts
        if not names:
            return {}
        rows = [self._rows[caption] for caption in captions]
        parts = rows[0] if len(rows) == 1 else map(torch.cat, zip(*rows, strict=True))
        return dict(zip(names, parts, strict=True))


class ShardBatches:
    """The batches of a shard, for a loader whose workers go on from shard to shard."""

    def __init__(self) -> None:
        self.batches: Sequence[list[int]] = ()

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class CacheSamples:
    """Makes the samples of a cache's shards out of those of the source, in the same order.

    on_error: "stop" raises ImageError for an image that cannot be decoded, "skip" leaves it out.
    on_encoded is called with the number of samples of each batch.
    """

    def __init__(
        self,
        source: CacheSource,
        encoder: CacheEncoder,
        *,
        workers: int,
        on_error: Literal["stop", "skip"] = "stop",
        on_encoded: Callable[[int], object] = lambda count: None,
    ) -> None:
        self.source, self.encoder = source, encoder
        self.on_error, self.on_encoded = on_error, on_encoded
        self._batches = ShardBatches()
        self._loader = DataLoader(
            source,
            batch_sampler=self._batches,
            collate_fn=pass_batch,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            persistent_workers=workers > 0,
            worker_init_fn=stop_with_parent,
        )

    def __call__(
        self, shard: CacheShard, skipped: list[BadSample]
    ) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Yields key and members of a shard's samples; adds those that it leaves out."""
        windows = [
            self._split(range(first, min(first + WINDOW, shard.end)))
            for first in range(shard.first, shard.end, WINDOW)
        ]
        self._batches.batches = [batch for window in windows for batch in window]
        with block_stop_signals():
            batches = iter(self._loader)
        states = CaptionStates(self.encoder)
        for window in windows:
            latents, records = {}, {}
            for batch in itertools.islice(batches, len(window)):
                skipped += self._find_skipped(batch)
                records |= batch.records
                if batch.images is not None:
                    parts = self.encoder.encode_images(batch.images)
                    self._check_finite(parts, list(batch.records))
                    rows = zip(*(part.unbind() for part in parts.values()), strict=True)
                    named = (dict(zip(parts, row, strict=True)) for row in rows)
                    latents |= dict(zip(batch.records, named, strict=True))
                self.on_encoded(len(batch.records) + len(batch.damaged))
            yield from self._pack(sorted(records), latents, records, states)

    def _split(self, window: Sequence[int]) -> list[list[int]]:
        """Returns batches of samples of one size."""
        groups: dict[object, list[int]] = {}
        for i in window:
            groups.setdefault(self.source.images.size_at(i), []).append(i)
        batch = self.encoder.batch
        return [
            group[first : first + batch]
            for group in groups.values()
            for first in range(0, len(group), batch)
        ]

    def _find_skipped(self, batch: SourceBatch) -> list[BadSample]:
        found = list(batch.damaged.values())
        if found and self.on_error != "skip":
            raise ImageError(f"{found[0].message}: mend it, or leave it out with on_error=skip")
        return found

    def _pack(
        self, indices: Sequence[int], latents: dict, records: dict, states: CaptionStates
    ) -> Iterator[tuple[str, dict[str, bytes]]]:
        for first in range(0, len(indices), TEXT_WINDOW):
            part = indices[first : first + TEXT_WINDOW]
            states.add(caption for i in part for caption in records[i]["captions"])
            for i in part:
                tensors = latents[i] | states.stack(records[i]["captions"])
                members = pack_sample(tensors, records[i], stamp=self.encoder.manifest.stamp)
                if (size := len(members[RECORD_SUFFIX])) > MAX_TEXT_BYTES:
                    raise CacheError(
                        f"{self.source.images.shards.sample_name(i)} has a json of {size} bytes, "
                        f"{MAX_TEXT_BYTES} are the most: give max_captions=1, or shorten it"
                    )
                yield self.source.key(i), members

    def _check_finite(self, parts: dict[str, Tensor], indices: Sequence[int]) -> None:
        try:
            check_finite(parts)
        except CacheError as error:
            rows = torch.stack([part.flatten(1).isfinite().all(1) for part in parts.values()])
            bad = indices[int(rows.all(0).int().argmin())]
            name = self.source.images.shards.sample_name(bad)
            raise CacheError(f"{name} {error} as encoded: {FINITE_REMEDY}") from error
