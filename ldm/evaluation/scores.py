"""Tables of features to metrics: distances to real images, and agreement with captions.

Shapes: N generated images, M real ones, D features.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

from torch import Tensor

from ldm.evaluation.features.base import FeatureExtractor, select_class_features
from ldm.evaluation.metrics.clip_score import clip_score, compute_clip_score_chance
from ldm.evaluation.metrics.frechet import frechet_distance, frechet_estimate
from ldm.evaluation.metrics.inception_score import inception_score
from ldm.evaluation.metrics.intervals import (
    Estimate,
    Interval,
    bootstrap_mean,
    jackknife,
    wilson_interval,
)
from ldm.evaluation.metrics.kernel_distances import KernelDistances
from ldm.evaluation.metrics.moments import Moments
from ldm.evaluation.metrics.precision_recall import Manifold

SCORES_SEED = 0  # of KID's subsets, the splits of the inception score, and the intervals
KID_SUBSET_SIZE = 1000  # or half of the smaller side
FID_NETWORK = "inception"  # the network whose Frechet distance is called FID
CMMD_NETWORK = "clip"  # the network of CMMD and of the metric clip_score
Tables = Mapping[str, Tensor]  # features by network


class Scores:
    """The tables that generated images are compared with, and the metrics of the comparison.

    real (M, D): real images. floor (N', D): the real images of the captions, which a perfect model
    would generate. texts (N, D), floor_texts (N', D): captions of generated images and of `floor`,
    for networks that encode captions. KID and the nearest-neighbour metrics are of Inception if it
    is there, else of the first network.
    """

    def __init__(
        self,
        networks: Sequence[FeatureExtractor],
        real: Tables,
        floor: Tables,
        texts: Tables,
        floor_texts: Tables,
    ) -> None:
        self.real, self.floor, self.texts = real, floor, texts
        self.first = choose_main_network(networks)
        self.moments = {name: Moments.of(table) for name, table in real.items()}
        self.manifold = Manifold(real[self.first])
        self.kernels = {name: KernelDistances(table) for name, table in real.items()}
        self.classifier = select_class_features(networks)
        self._floor_frechet = self._estimate_frechet(floor, errors=False)
        self.constant = {f"{name}_floor": one.value for name, one in self._floor_frechet.items()}
        for name, captions in floor_texts.items():
            score = clip_score(floor[name], captions)
            self.constant[f"{clip_score_key(name)}_real"] = float(score.mean())

    def metrics(self, generated: Tables) -> dict[str, float]:
        """Returns `compute_distances`, clip_score, clip_score_chance, and constant metrics.

        Constant are fid_floor, fd_*_floor, and clip_score_real, of real images with their own
        captions. clip_score_chance is of generated images with all captions but their own.
        """
        return self.compute_distances(generated) | self._score_captions(generated) | self.constant

    def estimate_metrics(self, generated: Tables) -> tuple[dict[str, float], dict[str, Interval]]:
        """Returns `metrics`, and 95 % intervals over draws of as many images, by metric."""
        estimates = self._estimate_frechet(generated, errors=True)
        estimates |= self._estimate_others(generated, errors=True)
        intervals = {name: estimate.interval() for name, estimate in estimates.items()}
        low, high = intervals["density"]
        intervals["density"] = Interval(max(low, 0.0), high)
        share, count = estimates["precision"].value, len(generated[self.first])
        intervals["precision"] = wilson_interval(share, count)
        for name in ("recall", "coverage"):
            intervals[name] = estimates[name].share_interval(len(self.real[self.first]))
        for name, texts in self.texts.items():
            each = clip_score(generated[name], texts)
            intervals[clip_score_key(name)] = bootstrap_mean(each, seed=SCORES_SEED)
        distances = _get_values(estimates) | self._score_classes(generated)
        return distances | self._score_captions(generated) | self.constant, intervals

    def compute_distances(self, generated: Tables) -> dict[str, float]:
        """Returns fid or fd_<network>, kid, cmmd, precision, recall, .., and inception_score."""
        estimates = self._estimate_frechet(generated, errors=False)
        estimates |= self._estimate_others(generated, errors=False)
        return _get_values(estimates) | self._score_classes(generated)

    @cached_property
    def floor_distances(self) -> dict[str, float]:
        """`compute_distances` of the real images of the captions: those of a perfect model."""
        estimates = self._floor_frechet | self._estimate_others(self.floor, errors=False)
        return _get_values(estimates) | self._score_classes(self.floor)

    def _estimate_frechet(self, generated: Tables, *, errors: bool) -> dict[str, Estimate]:
        """Errors take time; without them they are NaN."""
        return {
            distance_key(name): frechet_estimate(moments, generated[name])
            if errors
            else Estimate(frechet_distance(moments, Moments.of(generated[name])), math.nan)
            for name, moments in self.moments.items()
        }

    def _estimate_others(self, generated: Tables, *, errors: bool) -> dict[str, Estimate]:
        rows, real = generated[self.first], self.real[self.first]
        size = min(KID_SUBSET_SIZE, len(rows) // 2, len(real) // 2)
        kernels = self.kernels[self.first]
        estimates = {"kid": kernels.kid(rows, seed=SCORES_SEED, subset_size=size)}
        if errors:
            groups = max(2, min(20, len(rows) // 8))
            estimates |= jackknife(
                self.manifold.compare_without, rows, seed=SCORES_SEED, groups=groups
            )
        else:
            shares = self.manifold.compare(rows)
            estimates |= {name: Estimate(value, math.nan) for name, value in shares.items()}
        if CMMD_NETWORK in generated:
            estimates["cmmd"] = self.kernels[CMMD_NETWORK].cmmd(generated[CMMD_NETWORK])
        return estimates

    def _score_classes(self, generated: Tables) -> dict[str, float]:
        if self.classifier is None:
            return {}
        table = generated[self.classifier.name]
        probabilities = self.classifier.logits(table).softmax(dim=1)
        splits = min(10, len(table) // 2)
        return {"inception_score": inception_score(probabilities, seed=SCORES_SEED, splits=splits)}

    def _score_captions(self, generated: Tables) -> dict[str, float]:
        scores = {}
        for name, texts in self.texts.items():
            key, images = clip_score_key(name), generated[name]
            scores[key] = float(clip_score(images, texts).mean())
            scores[f"{key}_chance"] = compute_clip_score_chance(images, texts)
        return scores


def _get_values(estimates: Mapping[str, Estimate]) -> dict[str, float]:
    return {name: estimate.value for name, estimate in estimates.items()}


def choose_main_network(networks: Sequence[FeatureExtractor]) -> str:
    """Returns the network of the metrics whose keys name no network."""
    names = [network.name for network in networks]
    return FID_NETWORK if FID_NETWORK in names else names[0]


def distance_key(network: str) -> str:
    """Returns the key of a Frechet distance: fid for Inception's features, else fd_<network>."""
    return "fid" if network == FID_NETWORK else f"fd_{network}"


def clip_score_key(network: str) -> str:
    """Returns the key of a CLIP's score: clip_score for `clip`, else clip_score_<network>."""
    return "clip_score" if network == CMMD_NETWORK else f"clip_score_{network}"
