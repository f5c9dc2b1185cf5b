"""The evaluation protocol: how well generated images match real ones and their captions.

Shapes: N generated images, M real ones, D features.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.data.dataset import TextImageDataset
from ldm.data.image_decoding import TargetSize, describe_size
from ldm.evaluation.distributed import ProcessGroup
from ldm.evaluation.feature_table import IMAGE_ROWS, tabulate
from ldm.evaluation.features.base import FeatureExtractor, select_caption_features
from ldm.evaluation.image_metrics import ImageMetric, ImageMetrics
from ldm.evaluation.metrics.intervals import Interval
from ldm.evaluation.prompt_subset import PromptSubset, shuffle_indices
from ldm.evaluation.reference import compute_real_features
from ldm.evaluation.scores import Scores, choose_main_network
from ldm.utils.images import to_uint8_tensor

# (prompts, seeds=...) -> images (n, 3, H, W) in [-1, 1]
CaptionImageGenerator = Callable[..., Tensor]
EvaluationProgress = Callable[[range], None]
MIN_IMAGES = 8  # of generated and of real images
PROTOCOL_VERSION = 1  # goes up when the same images get other numbers


class TooFewImagesError(ValueError):
    """There are too few images for metrics."""


def select_prompt_subset(
    dataset: TextImageDataset, others: TextImageDataset | None, count: int, *, seed: int = 0
) -> PromptSubset:
    """Draws `count` captions of the data set; of one half, where there are no other real images."""
    check_image_count("images to measure", count, setting="count=")
    within = len(dataset) // 2 if lacks_reference_images(dataset, others) else None
    return PromptSubset.draw(dataset.shards, count, seed=seed, within=within)


def check_image_count(what: str, count: int, *, setting: str = "") -> None:
    """Raises TooFewImagesError where these are too few images to measure."""
    if count < MIN_IMAGES:
        what = what.replace("images", "image", 1) if count == 1 else what
        raise TooFewImagesError(f"{count} {what}: it takes {setting}{MIN_IMAGES} or more")


def lacks_reference_images(dataset: TextImageDataset, others: TextImageDataset | None) -> bool:
    """Returns whether there are no other images, or only the very same ones."""
    return others is None or others.shards.index.fingerprint == dataset.shards.index.fingerprint


class EvaluationProtocol:
    """Compares images generated from the captions of `subset` with real images.

    dataset: real images with the captions of `subset`; their own metrics are the floors, those of a
    perfect model. others: the reference, real images of the same kind, `at_most` of them. Without
    others the captions must be of one half of `dataset` (`select_prompt_subset`), and the reference
    is the other half: a reference with the images of the captions would lower all distances.
    size: of all images, in pixels. has_captions: generated images depend on the captions.
    metrics: those of a user's own, by name; with them there need not be networks.
    """

    def __init__(
        self,
        networks: Sequence[FeatureExtractor],
        *,
        dataset: TextImageDataset,
        others: TextImageDataset | None,
        subset: PromptSubset,
        size: TargetSize,
        cache: Path,
        at_most: int = 10_000,
        batch: int = 32,
        has_captions: bool = True,
        metrics: Mapping[str, ImageMetric] | None = None,
    ) -> None:
        if not networks and not metrics:
            raise ValueError("there is no network to measure by: give features=[clip]")
        if subset.data != dataset.shards.index.fingerprint:
            raise ValueError("the captions of the subset are of other images than data")
        self.networks, self.dataset, self.subset = networks, dataset, subset
        self.size, self.cache, self.batch = size, cache, batch
        self.has_captions, self.metrics = has_captions, ImageMetrics(metrics or {})
        if lacks_reference_images(dataset, others):
            half = len(dataset) // 2
            self.reference = dataset
            self.real_indices = range(half, min(len(dataset), half + at_most))
            self.floor_indices = range(min(len(subset), half))
            keys = [dataset.shards.index.key(i) for i in shuffle_indices(len(dataset))]
            # Keys may occur several times, one in each shard: those of both halves prove nothing.
            known = {keys[i] for i in self.real_indices} - set(keys[:half])
            if both := known & set(subset.keys):
                raise ValueError(
                    f"{len(both)} captions of the subset are of images of the reference: give "
                    "others=DIR, or a subset that was drawn without them"
                )
        else:
            self.reference = others
            self.real_indices = range(min(at_most, len(others)))
            self.floor_indices = range(min(len(subset), len(dataset)))
        check_image_count("images to measure", len(subset))
        check_image_count("real images to compare with", len(self.real_indices))
        check_image_count("real images for the floor", len(self.floor_indices))
        self.device = torch.device("cpu")  # that of `prepare`
        self.is_prepared = False
        self.scores: Scores | None = None  # on the first rank, after `prepare`

    def prepare(self, device: torch.device, done: EvaluationProgress = lambda items: None) -> None:
        """Computes the features of real images and captions, once; all ranks must call it."""
        if self.is_prepared:
            return
        self.device = device
        how = {"size": self.size, "batch": self.batch, "cache": self.cache}
        how |= {"device": device, "done": done}
        real = compute_real_features(self.networks, self.reference, self.real_indices, **how)
        floor = compute_real_features(self.networks, self.dataset, self.floor_indices, **how)
        if self.networks and ProcessGroup().rank == 0:
            texts, floor_texts = self._encode_captions(device) if self.has_captions else ({}, {})
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
        """Returns float32 tables (N, D) by network, of images generated from the captions.

        All ranks must call it. folder, done: see `tabulate`. on_images(items, images): called with
        each batch of images (n, 3, H, W), uint8.
        """

        def make(items: range) -> Mapping[str, Tensor]:
            part = slice(items.start, items.stop)
            images = generate(self.subset.captions[part], seeds=self.subset.seeds[part])
            images = to_uint8_tensor(images)
            on_images(items, images)
            rows = {network.name: network(images) for network in self.networks}
            return rows | ({IMAGE_ROWS: images} if self.metrics.names else {})

        columns = {network.name: network.width for network in self.networks}
        how = {"columns": columns, "batch": self.batch, "folder": folder, "done": done}
        if self.metrics.names:
            self.metrics.reset(self.device)
            if self.metrics.needs_real_images:
                self._add_real_images()
            how["on_images"] = self._add_generated_images
        return tabulate(len(self.subset), make, **how)

    def measure(self, features: Mapping[str, Tensor]) -> dict[str, float]:
        """Returns the metrics of such tables on all ranks; the first rank computes them."""
        ranks, results = ProcessGroup(), None
        if ranks.rank == 0:
            known = {} if self.scores is None else self.scores.metrics(features)
            results = self._join_metrics(known)
        return ranks.share(results)

    def estimate(
        self, features: Mapping[str, Tensor]
    ) -> tuple[dict[str, float], dict[str, Interval], dict[str, float]]:
        """Returns the metrics likewise, their 95 % intervals, and the distances of the floor."""
        ranks, results = ProcessGroup(), None
        if ranks.rank == 0 and self.scores is None:
            results = self._join_metrics({}), {}, {}
        elif ranks.rank == 0:
            known, intervals = self.scores.estimate_metrics(features)
            results = self._join_metrics(known), intervals, self.scores.floor_distances
        return ranks.share(results)

    def facts(self) -> dict:
        """Returns all that another evaluation must share to get the same numbers."""
        return {
            "protocol": PROTOCOL_VERSION,
            "painted": len(self.subset),
            "subset": self.subset.digest,
            "real": len(self.real_indices),
            "floor": len(self.floor_indices),
            "data": self.subset.data,
            "compared": self.reference.shards.index.fingerprint,
            "size": describe_size(self.size),
            "crop": "center",
            "first": choose_main_network(self.networks) if self.networks else None,
            "networks": {network.name: network.digest for network in self.networks},
            **({"metrics": self.metrics.names} if self.metrics.names else {}),
        }

    def _add_real_images(self) -> None:
        """Passes the real images and their captions to the metrics."""
        order = shuffle_indices(len(self.reference))
        order = order[self.real_indices.start : self.real_indices.stop]
        captions: dict[range, list[str]] = {}

        def read(items: range) -> Mapping[str, Tensor]:
            found = [self.reference[order[i], order[i]] for i in items]
            captions[items] = [item["captions"] for item in found]
            return {IMAGE_ROWS: torch.stack([item["images"] for item in found])}

        def add(items: range, images: Tensor) -> None:
            self._add_images(images, captions.pop(items, []), real=True)

        tabulate(len(order), read, columns={}, batch=self.batch, on_images=add)

    def _add_generated_images(self, items: range, images: Tensor) -> None:
        self._add_images(images, self.subset.captions[items.start : items.stop], real=False)

    def _add_images(self, images: Tensor, captions: Sequence[str], *, real: bool) -> None:
        """Passes the images of all processes to the metrics of the first one."""
        for part, names in ProcessGroup().gather((images, captions)):
            if names:
                self.metrics.update(part.to(self.device), names, real=real)

    def _join_metrics(self, known: dict[str, float]) -> dict[str, float]:
        """Returns known metrics and the user's own; ValueError for two of one name."""
        own = self.metrics.compute()
        if both := known.keys() & own.keys():
            raise ValueError(f"metrics: {', '.join(sorted(both))} is measured already: rename it")
        return known | own

    def _encode_captions(self, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns tables by network: of the captions, and of those of the floor's images."""
        floor = shuffle_indices(len(self.dataset))[: len(self.floor_indices)]
        own = [self.dataset.shards.read(i).captions[0] for i in floor]
        captions = list(dict.fromkeys([*self.subset.captions, *own]))  # each once
        row = {caption: i for i, caption in enumerate(captions)}
        texts, floor_texts = {}, {}
        for network in select_caption_features(self.networks):
            parts = [captions[i : i + self.batch] for i in range(0, len(captions), self.batch)]
            table = torch.cat([network.encode_texts(part, device=device).cpu() for part in parts])
            texts[network.name] = table[[row[caption] for caption in self.subset.captions]]
            floor_texts[network.name] = table[[row[caption] for caption in own]]
        return texts, floor_texts
