"""How well painted pictures match real ones and their captions: one protocol, in a run and after.

Shapes: N painted pictures, M real ones, D features.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.data.dataset import TextImageDataset
from ldm.evaluation.distributed import ProcessGroup
from ldm.evaluation.feature_table import tabulate
from ldm.evaluation.features.base import FeatureExtractor
from ldm.evaluation.metrics.intervals import Interval
from ldm.evaluation.prompt_subset import PromptSubset, shuffle_indices
from ldm.evaluation.reference import compute_real_features
from ldm.evaluation.scores import Scores, choose_main_network
from ldm.utils.images import to_uint8_tensor

CaptionImageGenerator = Callable[
    ..., Tensor
]  # (prompts, seeds=...) -> images (n, 3, H, W) in [-1, 1]
EvaluationProgress = Callable[[range], None]
MIN_IMAGES = 8  # pictures of a kind
PROTOCOL_VERSION = 1  # goes up when the same pictures get other numbers


class TooFewImagesError(ValueError):
    """Not enough pictures to say anything of them."""


def select_prompt_subset(
    dataset: TextImageDataset, others: TextImageDataset | None, count: int, *, seed: int = 0
) -> PromptSubset:
    """`Subset.drawn` of these pictures, or where there are no others to compare with, of a half.

    Raises TooFewError for a count that is too low.
    """
    check_image_count("pictures to measure", count)
    within = len(dataset) // 2 if lacks_reference_images(dataset, others) else None
    return PromptSubset.drawn(dataset.shards, count, seed=seed, within=within)


def check_image_count(what: str, count: int) -> None:
    """Raise TooFewError where these are too few pictures to measure."""
    if count < MIN_IMAGES:
        what = what.replace("pictures", "picture", 1) if count == 1 else what
        raise TooFewImagesError(f"{count} {what}: it takes {MIN_IMAGES} or more")


def lacks_reference_images(dataset: TextImageDataset, others: TextImageDataset | None) -> bool:
    """Whether the others are none, or the very same pictures."""
    own = dataset.shards.index.fingerprint
    return others is None or others.shards.index.fingerprint == own


class EvaluationProtocol:
    """Painted pictures of `subset`'s captions against real ones, by what `networks` see in them.

    pictures: the real ones whose captions are painted. They show what a perfect model would, and
    give the floors. others: real pictures of the same kind to compare with, `at_most` of them;
    without them the captions must be of one half of `pictures` (`captions_to_paint`), and the
    other half is compared with. Pictures to compare with must not be those of the captions: that
    would bring every distance down, the unbiased ones below 0, and the more so the fewer they are.
    `size`: of all pictures, in pixels. What real pictures look like to the networks is kept in
    `cache`. captioned: whether the captions are what the painted pictures are to show.
    Raises ValueError where a subset is of other pictures, or of those to compare with;
    TooFewError where there are too few.
    """

    def __init__(
        self,
        networks: Sequence[FeatureExtractor],
        *,
        dataset: TextImageDataset,
        others: TextImageDataset | None,
        subset: PromptSubset,
        size: int,
        cache: Path,
        at_most: int = 10_000,
        batch: int = 32,
        has_captions: bool = True,
    ) -> None:
        if not networks:
            raise ValueError("there is no network to measure by: give features=[clip]")
        if subset.data != dataset.shards.index.fingerprint:
            raise ValueError("the captions to paint are of other pictures than data")
        self.networks = networks
        self.pictures = dataset
        self.subset = subset
        self.size = size
        self.cache = cache
        self.batch = batch
        self.has_captions = has_captions
        if lacks_reference_images(dataset, others):
            half = len(dataset) // 2
            self.reference = dataset
            self.real_indices = range(half, min(len(dataset), half + at_most))
            self.floor_indices = range(min(len(subset), half))
            order = shuffle_indices(len(dataset))
            keys = [dataset.shards.index.key(i) for i in order]
            # Where each shard numbers its own, keys come again: those of both halves say nothing.
            known = {keys[place] for place in self.real_indices} - set(keys[:half])
            if both := known & set(subset.keys):
                raise ValueError(
                    f"the captions to paint are of {len(both)} pictures that they would be "
                    "compared with: give others=DIR, or a subset that was drawn without them"
                )
        else:
            self.reference = others
            self.real_indices = range(min(at_most, len(others)))
            self.floor_indices = range(min(len(subset), len(dataset)))
        for what, n in {
            "pictures to measure": len(subset),
            "real pictures to compare with": len(self.real_indices),
            "real pictures for the floor": len(self.floor_indices),
        }.items():
            check_image_count(what, n)
        self.is_prepared = False
        self.scores: Scores | None = None  # the first rank's, once prepared

    def prepare(self, device: torch.device, done: EvaluationProgress = lambda items: None) -> None:
        """Real pictures and captions through the networks, at the first call; all ranks take part.

        done: see `tabulate`.
        """
        if self.is_prepared:
            return
        same = {"batch": self.batch, "cache": self.cache, "device": device, "done": done}
        same["size"] = self.size
        real = compute_real_features(self.networks, self.reference, self.real_indices, **same)
        floor = compute_real_features(self.networks, self.pictures, self.floor_indices, **same)
        if ProcessGroup().rank == 0:
            texts, floor_texts = self._captions(device) if self.has_captions else ({}, {})
            self.scores = Scores(self.networks, real, floor, texts, floor_texts)
        self.is_prepared = True

    def extract_features(
        self,
        generate: CaptionImageGenerator,
        *,
        folder: Path | None = None,
        done: EvaluationProgress = lambda items: None,
        on_images: Callable[[range, Tensor], None] = lambda items, images: None,
    ) -> dict[str, Tensor]:
        """float32 tables (N, D) by network, of the subset's captions painted; all ranks take part.

        folder, done: see `tabulate`. on_images(items, images): called with
        images (n, 3, H, W), uint8.
        """

        def make(items: range) -> Mapping[str, Tensor]:
            part = slice(items.start, items.stop)
            images = generate(self.subset.captions[part], seeds=self.subset.seeds[part])
            pixels = to_uint8_tensor(images)
            on_images(items, pixels)
            return {network.name: network(pixels) for network in self.networks}

        columns = {network.name: network.width for network in self.networks}
        return tabulate(
            len(self.subset), make, columns=columns, batch=self.batch, folder=folder, done=done
        )

    def measure(self, seen: Mapping[str, Tensor]) -> dict[str, float]:
        """The metrics of such tables, computed by the first rank, known to all."""
        ranks = ProcessGroup()
        return ranks.share(self.scores.metrics(seen) if ranks.rank == 0 else None)

    def estimate(
        self, seen: Mapping[str, Tensor]
    ) -> tuple[dict[str, float], dict[str, Interval], dict[str, float]]:
        """The metrics likewise, their 95 % intervals, and the distances of the floor."""
        ranks, scores = ProcessGroup(), self.scores
        found = (
            (*scores.estimate_metrics(seen), scores.floor_distances) if ranks.rank == 0 else None
        )
        return ranks.share(found)

    def facts(self) -> dict:
        """What another must do alike to get the same numbers, as plain values."""
        return {
            "protocol": PROTOCOL_VERSION,
            "painted": len(self.subset),
            "subset": self.subset.digest,
            "real": len(self.real_indices),
            "floor": len(self.floor_indices),
            "data": self.subset.data,
            "compared": self.reference.shards.index.fingerprint,
            "size": self.size,
            "crop": "center",
            "first": choose_main_network(self.networks),
            "networks": {network.name: network.digest for network in self.networks},
        }

    def _captions(self, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Tables by network that knows captions: of those painted, and of the floor's own.

        A caption that comes again is read once.
        """
        own = [
            self.pictures.shards.read(i).captions[0]
            for i in shuffle_indices(len(self.pictures))[: len(self.floor_indices)]
        ]
        captions = list(dict.fromkeys([*self.subset.captions, *own]))
        row = {caption: i for i, caption in enumerate(captions)}
        texts, floor_texts = {}, {}
        for network in self.networks:
            if not hasattr(network, "texts"):
                continue
            parts = [captions[i : i + self.batch] for i in range(0, len(captions), self.batch)]
            table = torch.cat([network.texts(part, device=device).cpu() for part in parts])
            texts[network.name] = table[[row[caption] for caption in self.subset.captions]]
            floor_texts[network.name] = table[[row[caption] for caption in own]]
        return texts, floor_texts
