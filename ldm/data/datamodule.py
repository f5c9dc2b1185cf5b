"""Lightning's data module for shards of image-text pairs.

Shapes: N samples, B batch of one rank and micro-step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from ldm.data.bad_samples import BadSampleCounter
from ldm.data.batch_slots import PREFETCH, BatchDataset, SampleDataset, allocate_slots, pass_batch
from ldm.data.bucket_order import BucketedOrder
from ldm.data.buckets import Buckets, choose_buckets, number_target_sizes
from ldm.data.dataset import Batch, TextImageDataset
from ldm.data.pixel_area import parse_pixels
from ldm.data.position_sampler import (
    PositionBatchSampler,
    SampleOrder,
    ShuffledOrder,
    split_batch,
    split_strided_batches,
)
from ldm.data.shards.cache import ShardCache
from ldm.data.shards.data_sets import list_data_sets
from ldm.data.shards.index import ReadOptions
from ldm.data.shards.locations import ShardSource
from ldm.data.shards.prefetch import ShardPrefetcher
from ldm.data.shards.reader import ShardReader
from ldm.data.shards.remote import RemoteShard
from ldm.utils.signals import block_stop_signals, stop_with_parent
from ldm.utils.transfer import send


class TextImageData(L.LightningDataModule):
    """Images with one caption each, in an order that is a function of (seed, position).

    size: side of the square images. buckets: sizes [width, height] for images of other aspects, or
    "auto": of `pixels` each (default size * size), with sides in multiples of `grid`; each image
    goes to the one that cuts away least of it, and all images of an optimizer step to one.
    train, val: see `locate_shards`; train may list data sets with weights and sizes of their own
    (see `list_data_sets`), which then have buckets of their own. min_size, caption_key, captions:
    see `ReadOptions`; where and val_where: its `where`, of training and of validation;
    crop, flip, on_error, frames: see `TextImageDataset`; window, group: see `ShuffledOrder`.
    batch_size: images of an optimizer step over all ranks and micro-steps, so that a run may resume
    on another number of devices. The training loader starts at `position`, the images seen, which
    the training advances.
    max_skipped: with on_error="skip", the share of bad samples above which the run stops.
    cache: the folder for shards of servers, at most `cache_gb` of 10^9 bytes; the next shards of a
    run are downloaded ahead. datasets: for training and validation, in place of images; what says
    how images are read is then unused.
    """

    def __init__(
        self,
        *,
        train: ShardSource,
        val: ShardSource,
        size: int,
        buckets: Sequence[Sequence[int]] | Literal["auto"] | None = None,
        pixels: int | str | None = None,
        grid: int = 64,
        batch_size: int,
        crop: str = "random",
        flip: float = 0.5,
        window: int = 4,
        group: int = 1,
        workers: int = 2,
        val_batch_size: int = 64,
        val_limit: int | None = None,
        on_error: Literal["stop", "skip"] = "stop",
        max_skipped: float = 0.01,
        min_size: int | None = None,
        where: str | None = None,
        val_where: str | None = None,
        cache: str | None = None,
        cache_gb: float = 50.0,
        frames: int | None = None,
        caption_key: str | None = None,
        captions: Mapping[str, float] | None = None,
        datasets: tuple[SampleDataset, SampleDataset] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.size = size
        self.frames = frames
        self.batch_size = batch_size
        self.workers = workers
        self.val_batch_size = val_batch_size
        self.val_limit = val_limit
        self.position = 0
        self.buckets: tuple[Buckets, Buckets] | None = None  # of training and validation images
        self._prefetcher: ShardPrefetcher | None = None
        self._prefetched_at = 0
        self.cache = ShardCache(cache, gigabytes=cache_gb) if cache else None
        data_sets = list_data_sets(train)
        if datasets is None:
            own_sides = [one.size or 0 for one in data_sets]
            has_sizes = buckets is not None or any(own_sides)
            options = ReadOptions(
                min_size=min_size,
                cache=self.cache,
                caption_key=caption_key,
                captions=captions,
                on_error=on_error,
                measure=has_sizes,
            )
            common = {"size": size, "on_error": on_error, "frames": frames, "seed": seed}
            common |= {"fast_pixels": True}  # unless `resume` finds otherwise
            train_shards = ShardReader(train, replace(options, where=where))
            val_shards = ShardReader(val, replace(options, where=val_where))
            draws = {"crop": crop, "flip": flip}
            datasets = (
                TextImageDataset(train_shards, **common, **draws, train=True),
                TextImageDataset(val_shards, **common, train=False),
            )
            if has_sizes:
                index = train_shards.index
                self.buckets = choose_buckets(
                    index.sizes,
                    val_shards.index.sizes,
                    buckets,
                    side=size,
                    pixels=parse_pixels(pixels or size * size),
                    grid=grid,
                    batch=batch_size,
                    own_sides=np.repeat(own_sides, index.set_sizes()) if own_sides else None,
                )
                for dataset, own in zip(datasets, self.buckets, strict=True):
                    dataset.target_sizes = own.target_sizes
        self.train_set, self.val_set = datasets
        self.train_skips = BadSampleCounter("training", limit=max_skipped)
        self.val_skips = BadSampleCounter("validation", limit=max_skipped)
        index = self.train_set.shards.index
        sizes, paths = index.shard_sizes(), index.paths
        self._remote = {
            i: path for i, path in enumerate(paths) if sizes[i] and isinstance(path, RemoteShard)
        }
        how = {"seed": seed, "window": window, "group": group}
        self.order: SampleOrder = ShuffledOrder(sizes, **how)
        numbers = number_target_sizes(self.train_set.target_sizes)
        if numbers is not None or data_sets:
            numbers = np.zeros(len(index), np.int64) if numbers is None else numbers
            weights = [one.weight for one in data_sets]
            shares = list(zip(index.data_sets, weights, strict=True))
            self.order = BucketedOrder(sizes, numbers, batch=batch_size, data_sets=shares, **how)
            self.train_set.epoch_length = 1  # a sample may come twice in what is near an epoch

    def rules(self) -> dict[str, object]:
        """Returns what a checkpoint stores, so that the run resumes by the same rules."""
        return {**self.train_set.rules(), **self.order.rules()}

    def resume(self, facts: dict) -> None:
        """Continues after the images seen, by the rules of a checkpoint."""
        self.position = int(facts["images_seen"])
        for dataset in (self.train_set, self.val_set):
            dataset.follow_rules(facts)

    def train_captions(self) -> list[str]:
        """Returns every caption of the training set."""
        shards = self.train_set.shards
        return [text for i in range(len(shards)) for text in shards.read(i).captions]

    def val_captions(self, n: int) -> list[str]:
        """Returns the first captions of the first `n` validation samples."""
        shards = self.val_set.shards
        return [shards.read(i).captions[0] for i in range(min(n, len(shards)))]

    def micro_batch(self, world: int, accumulate: int) -> int:
        """Returns the images of one rank and micro-step; ValueError if they do not divide."""
        return split_batch(self.batch_size, world, accumulate)

    def train_dataloader(self) -> "FixedLengthLoader":
        """Returns the rest of the run, from `position` on."""
        trainer = self.trainer
        batch = self.micro_batch(trainer.world_size, trainer.accumulate_grad_batches)
        batches = PositionBatchSampler(
            self.order,
            batch=batch,
            rank=trainer.global_rank,
            world=trainer.world_size,
            start=lambda: self.position,
            on_position=self._prefetch,
        )
        length = trainer.max_steps * trainer.accumulate_grad_batches
        loader = self._make_loader(self.train_set, batches, batch=batch)
        return FixedLengthLoader(loader, length if length > 0 else 2**40)

    def _prefetch(self, position: int) -> None:
        if not self._remote:
            return
        if self._prefetcher is None or position < self._prefetched_at:
            self.teardown("fit")
            shards = self.order.shards_from(position)
            remotes = ((end, self._remote[i]) for end, i in shards if i in self._remote)
            self._prefetcher = ShardPrefetcher(self.cache, remotes, window=self.order.window)
        self._prefetcher.advance_to(position)
        self._prefetched_at = position

    def teardown(self, stage: str) -> None:
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    def val_dataloader(self) -> DataLoader:
        """Returns every validation sample once over all ranks; the last batch may be smaller."""
        batches = split_strided_batches(
            min(len(self.val_set), self.val_limit or len(self.val_set)),
            batch=self.val_batch_size,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
            kinds=number_target_sizes(self.val_set.target_sizes),
        )
        return self._make_loader(self.val_set, batches, batch=max(map(len, batches), default=0))

    def _make_loader(self, dataset: SampleDataset, batches, *, batch: int) -> DataLoader:
        ranks = self.trainer.num_devices
        slots = allocate_slots(dataset, batch=batch, workers=self.workers, ranks=ranks)
        return WholeBatchLoader(
            BatchDataset(dataset, slots),
            batch_sampler=batches,
            collate_fn=pass_batch,
            num_workers=self.workers,
            prefetch_factor=PREFETCH if self.workers else None,
            persistent_workers=self.workers > 0,
            pin_memory=slots is None and torch.cuda.is_available(),
            worker_init_fn=stop_with_parent,
        )

    def transfer_batch_to_device(
        self, batch: dict, device: torch.device, dataloader_idx: int
    ) -> dict:
        """Sends the bytes alone; Lightning would also look at each caption, position and key."""
        name = self.train_set.tensor_name
        return {**batch, name: send(batch[name], device)}

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Counts the skipped samples, and converts bytes on the device."""
        is_training = self.trainer is not None and self.trainer.training
        skips = self.train_skips if is_training else self.val_skips
        skips.add(len(batch["key"]), batch["skipped"])
        return (self.train_set if is_training else self.val_set).unpack(batch)


class WholeBatchLoader(DataLoader):
    """A DataLoader of a BatchDataset, whose workers ignore the signals that ask the run to stop."""

    def __iter__(self):
        with block_stop_signals():
            messages = super().__iter__()
        return self.dataset.open_batches(messages)


class FixedLengthLoader:
    """An endless loader with a length, so that Lightning fetches no batch that it does not use."""

    def __init__(self, loader: DataLoader, length: int) -> None:
        self.loader = loader
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        # Lightning ends the workers of `_iterator`; the garbage collector waits five seconds each.
        batches = iter(self.loader)
        self._iterator = self.loader._iterator
        return batches

    def state_dict(self) -> dict:
        """Returns nothing: the checkpoint has the position."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass
