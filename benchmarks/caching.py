"""What `ldm cache` costs besides its encoders, and what its latents are.

    python -m benchmarks.caching                     # 512 drawn scenes of 64 pixels, 7 rounds
    python -m benchmarks.caching --out runs/caching.json
    python -m benchmarks.caching --quick             # does it run?

  writing   the encoders alone on decoded images; all that the main process does, whose workers
            decode; and one process that does everything. The ratio is the share of the encoders'
            speed.
  flips     the latents of flipped images against flipped latents: the distance as a share of the
            latents' spread, and of the images that both decode to
  batches   means and text states of the same 16 images in batches of other sizes against batches of
            32: is every bit the same, and how far are they apart at most

The encoders are the packaged ones, which `ldm cache` and train.py take by default.
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import harness

BATCH = 32


def main(words: list[str] | None = None) -> None:
    """Measures each table."""
    parser = harness.make_parser("caching", __doc__)
    args = harness.parse(parser, words)
    report = harness.Report(args)
    with tempfile.TemporaryDirectory() as folder:
        work = CacheWork(Path(folder), count=64 if args.quick else 512)
        seconds = harness.race(work.variants(), rounds=args.rounds, title="writing")
        per = len(work.source)
        report.add("writing", harness.compare(seconds, base="encoders", unit="us", per=per))
        report.add("flips", work.compare_flips())
        report.add("batches", work.compare_batches())


class CacheWork:
    """Drawn scenes, the packaged encoders, and the cache that they make."""

    def __init__(self, folder: Path, *, count: int) -> None:
        import torch
        from hydra import compose, initialize_config_dir

        from ldm.config import caching
        from ldm.config.search_path import CONF_DIR
        from ldm.data.cached.source import CacheSource
        from ldm.data.scenes.prepare import prepare_scenes
        from ldm.utils.allocator import reuse_freed_memory

        torch.set_num_threads(1)
        reuse_freed_memory()  # as the command does
        self.folder = folder
        prepare_scenes(out=folder / "scenes", count=count, size=64, split="train")
        with initialize_config_dir(CONF_DIR, version_base="1.3"):
            cfg = compose("cache", ["out=unused", "cache=null"])
        options = {"data": str(folder / "scenes"), "ckpt": None, "where": None}
        device = torch.device("cpu")
        self.autoencoder, text_encoder, _ = caching.build_cache_encoders(cfg, options, device)
        images, _ = caching.open_cache_images(cfg, options, self.autoencoder.factor)
        self.source = CacheSource(images)
        self.encoder, self.null = caching.build_cache_encoder(
            cfg, self.source, self.autoencoder, text_encoder, device
        )
        self.decoded = DecodedSource(self.source)

    def variants(self) -> dict:
        """The encoders alone, and the writing of a whole cache."""
        return {
            "encoders": self.encode,
            "main process of ldm cache": lambda: self.write(self.decoded),
            "ldm cache workers=0": lambda: self.write(self.source),
        }

    def encode(self) -> None:
        """Encodes all images and captions, each caption once a shard, and keeps nothing."""
        from ldm.data.cached.writer import plan_cache_shards

        encoder = self.encoder
        for shard in plan_cache_shards(self.folder, self.source.images.shards.index):
            captions: dict[str, None] = {}
            for first in range(shard.first, shard.end, BATCH):
                batch = self.decoded.__getitems__(range(first, min(first + BATCH, shard.end)))
                encoder.encode_images(batch.images)
                texts = (record["captions"] for record in batch.records.values())
                captions |= dict.fromkeys(text for each in texts for text in each)
            unique = list(captions)
            for first in range(0, len(unique), BATCH):
                encoder.encode_captions(unique[first : first + BATCH])

    def write(self, source: "DecodedSource | object") -> None:
        """Writes a cache and deletes it."""
        from ldm.data.cached.writer import (
            claim_cache_folder,
            complete_manifest,
            plan_cache_shards,
            write_cache_shards,
        )
        from ldm.inference.encoding import CacheSamples

        out = self.folder / "cache"
        shards = plan_cache_shards(out, self.source.images.shards.index)
        claim_cache_folder(out, self.encoder.manifest, self.null)
        write_cache_shards(shards, CacheSamples(source, self.encoder, workers=0))
        complete_manifest(out, self.encoder.manifest, shards)
        shutil.rmtree(out)

    def compare_flips(self) -> list[harness.Row]:
        """Latents of flipped images against flipped latents."""
        import torch

        images = self.decoded.__getitems__(range(16)).images.float() / 127.5 - 1
        with torch.inference_mode():
            latents = self.autoencoder.encode(images)
            flipped = self.autoencoder.encode(images.flip(-1))
            decoded = self.autoencoder.decode(latents.flip(-1))
            right = self.autoencoder.decode(flipped)
        distance = (latents.flip(-1) - flipped).pow(2).mean().sqrt() / flipped.std()
        wrong, error = ((each - images.flip(-1)).pow(2).mean().sqrt() for each in (decoded, right))
        return [
            {"what": "distance of the latents / their spread", "value": distance.item()},
            {"what": "RMS error, decoded from flipped latents", "value": wrong.item() * 127.5},
            {"what": "RMS error, from latents of flipped images", "value": error.item() * 127.5},
        ]

    def compare_batches(self) -> list[harness.Row]:
        """Results in batches of several sizes."""
        import torch

        batch = self.decoded.__getitems__(range(BATCH))
        images = batch.images.float() / 127.5 - 1
        captions = [record["captions"][0] for record in batch.records.values()]
        count, rows = 16, []
        with torch.inference_mode():
            wanted = [part[:count] for part in self._encode(images, captions)]
            for size in (1, 2, 4, 8, 16, 24, 32):
                parts = [
                    self._encode(images[i : i + size], captions[i : i + size])
                    for i in range(0, count, size)
                ]
                found = [torch.cat(each)[:count] for each in zip(*parts, strict=True)]
                far = [(a - b).abs().max().item() for a, b in zip(found, wanted, strict=True)]
                same = [torch.equal(a, b) for a, b in zip(found, wanted, strict=True)]
                row = {"batch": size, "mean": same[0], "tokens": same[1], "pooled": same[2]}
                rows.append(row | {"apart": max(far)})
        return rows

    def _encode(self, images, captions: Sequence[str]) -> tuple:
        text = self.encoder.text_encoder(captions)
        return self.encoder.posterior(images)[0], text.tokens, text.pooled


class DecodedSource:
    """A source whose batches were read before: what workers do is not measured."""

    def __init__(self, source) -> None:
        self.source, self.images, self.key = source, source.images, source.key
        self._batches: dict[tuple[int, ...], object] = {}

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: Sequence[int]):
        """Returns a batch, decoded at the first call."""
        at = tuple(indices)
        if at not in self._batches:
            self._batches[at] = self.source.__getitems__(list(at))
        return self._batches[at]


if __name__ == "__main__":
    main()
