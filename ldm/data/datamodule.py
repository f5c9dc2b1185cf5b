"""Shards of image-text pairs as Lightning's data.

Shapes: B batch of one rank and micro-step, S the side of the square picture.
"""

from typing import Literal

import lightning as L
import torch
from torch.utils.data import DataLoader

from ldm.data.bad_samples import BadSampleCounter
from ldm.data.dataset import Batch, TextImageDataset, collate
from ldm.data.position_sampler import PositionBatchSampler, ShuffledOrder, split_strided_batches
from ldm.data.shards.cache import ShardCache
from ldm.data.shards.locations import ShardSource
from ldm.data.shards.prefetch import ShardPrefetcher
from ldm.data.shards.reader import ShardReader
from ldm.data.shards.remote import RemoteShard
from ldm.utils.signals import block_stop_signals, stop_with_parent


class TextImageData(L.LightningDataModule):
    """Square pictures with one caption each, in an order that is a function of (seed, position).

    `batch_size` is the global one: images of an optimizer step over all ranks and micro-steps, so
    that the same run may go on with another number of devices. `position` counts the images seen;
    whoever trains advances it, and the loader starts there. `window` and `group`: see `Order`.
    `on_error`: "stop" at a damaged picture, or "skip" it, see `TextImages`; `train_skips` and
    `val_skips` then count, and stop the run above `max_skipped` of the samples seen.
    `train`, `val`: see `locate`. `min_size`: pictures with a shorter side, in pixels, are left out
    when the index is loaded. `cache`: the folder where shards of servers are kept, at most
    `cache_gb` of 10^9 bytes; the next of a run are fetched ahead. `frames`: see `TextImages`.
    `caption_key`: the key of the samples' json that holds their captions; None: see
    `sample_captions`.
    Raises FileNotFoundError or ShardError where there are no intact shards, RemoteError where a
    server fails, ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        *,
        train: ShardSource,
        val: ShardSource,
        size: int,
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
        cache: str | None = None,
        cache_gb: float = 50.0,
        frames: int | None = None,
        caption_key: str | None = None,
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
        self._ahead: ShardPrefetcher | None = None
        self._ahead_at = 0
        self.cache = ShardCache(cache, gigabytes=cache_gb) if cache else None
        how = {"min_size": min_size, "caption_key": caption_key, "on_error": on_error}
        train_shards = ShardReader(train, cache=self.cache, **how)
        val_shards = ShardReader(val, cache=self.cache, **how)
        self.train_set = TextImageDataset(
            train_shards,
            size=size,
            crop=crop,
            flip=flip,
            on_error=on_error,
            frames=frames,
            seed=seed,
            train=True,
        )
        self.val_set = TextImageDataset(
            val_shards, size=size, on_error=on_error, frames=frames, seed=seed, train=False
        )
        self.train_skips = BadSampleCounter("training", limit=max_skipped)
        self.val_skips = BadSampleCounter("validation", limit=max_skipped)
        sizes, paths = train_shards.index.shard_sizes(), train_shards.index.paths
        self._remote = {
            i: path for i, path in enumerate(paths) if sizes[i] and isinstance(path, RemoteShard)
        }
        self.order = ShuffledOrder(sizes, seed=seed, window=window, group=group)

    def rules(self) -> dict[str, bool]:
        """What a checkpoint must say, so that the run goes on by the rules that it began with."""
        return {"even_crops": self.train_set.even_crops}

    def resume(self, facts: dict) -> None:
        """Go on after the images that were seen, by the rules of a checkpoint.

        One from before there were even crops does not name them.
        """
        self.position = int(facts["images_seen"])
        self.train_set.even_crops = facts.get("even_crops", False)

    def train_captions(self) -> list[str]:
        """Every caption of the training set."""
        shards = self.train_set.shards
        return [text for i in range(len(shards)) for text in shards.read(i).captions]

    def val_captions(self, n: int) -> list[str]:
        """The first captions of the first `n` validation samples."""
        shards = self.val_set.shards
        return [shards.read(i).captions[0] for i in range(min(n, len(shards)))]

    def micro_batch(self, world: int, accumulate: int) -> int:
        """Images of one rank and micro-step; ValueError where the global batch does not divide."""
        parts = world * accumulate
        if self.batch_size < 1 or self.batch_size % parts:
            below = self.batch_size // parts * parts
            near = " or ".join(str(n) for n in (below, below + parts) if n > 0)
            raise ValueError(
                f"data.batch_size={self.batch_size} is the batch of an optimizer step: it must be "
                f"a multiple of {parts} ({world} devices x {accumulate} accumulated), so {near}"
            )
        return self.batch_size // parts

    def train_dataloader(self) -> "FixedLengthLoader":
        """The rest of the run, from `position` on."""
        trainer = self.trainer
        batches = PositionBatchSampler(
            self.order,
            batch=self.micro_batch(trainer.world_size, trainer.accumulate_grad_batches),
            rank=trainer.global_rank,
            world=trainer.world_size,
            start=lambda: self.position,
            on_position=self._fetch_ahead,
        )
        length = trainer.max_steps * trainer.accumulate_grad_batches
        return FixedLengthLoader(
            self._loader(self.train_set, batches), length if length > 0 else 2**40
        )

    def _fetch_ahead(self, position: int) -> None:
        if not self._remote:
            return
        if self._ahead is None or position < self._ahead_at:
            self.teardown("fit")
            shards = self.order.shards_from(position)
            remotes = ((end, self._remote[i]) for end, i in shards if i in self._remote)
            self._ahead = ShardPrefetcher(self.cache, remotes, window=self.order.window)
        self._ahead.advance_to(position)
        self._ahead_at = position

    def teardown(self, stage: str) -> None:
        """End what runs beside the training."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def val_dataloader(self) -> DataLoader:
        """Every validation sample once over all ranks; the last batch may be smaller."""
        count = min(len(self.val_set), self.val_limit or len(self.val_set))
        share = split_strided_batches(
            count,
            batch=self.val_batch_size,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
        )
        return self._loader(self.val_set, share)

    def _loader(self, dataset: TextImageDataset, batches) -> DataLoader:
        return SignalSafeDataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=stop_with_parent,
        )

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Bytes travel to the device; there they become images (B, 3, S, S) in [-1, 1].

        With `frames`, videos (B, 3, F, S, S).

        Raises TooManySkippedError, see `Skips`.
        """
        training = self.trainer is not None and self.trainer.training
        skips = self.train_skips if training else self.val_skips
        skips.add(len(batch["key"]), batch["skipped"])
        return {**batch, "images": batch["images"].float() / 127.5 - 1}


class SignalSafeDataLoader(DataLoader):
    """A DataLoader whose workers leave signals that ask to stop to this process."""

    def __iter__(self):
        with block_stop_signals():
            return super().__iter__()


class FixedLengthLoader:
    """An endless loader with the length of the run, in batches: one Lightning epoch.

    Having a length also keeps Lightning from fetching a batch ahead that it would not train on.
    """

    def __init__(self, loader: DataLoader, length: int) -> None:
        self.loader = loader
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        # The name under which Lightning looks for workers to end. Left to the garbage collector,
        # each of them is waited for in vain for five seconds.
        self._iterator = iter(self.loader)
        return self._iterator

    def state_dict(self) -> dict:
        """Nothing: the position is all there is, and the checkpoint has it."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing, likewise."""
