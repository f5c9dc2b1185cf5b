"""Tables of features to metrics: distances to real pictures, and agreement with captions.

Shapes: N painted pictures, M real ones, D features.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

from torch import Tensor
from torch.nn.functional import normalize

from ldm.evaluation.features.base import FeatureExtractor
from ldm.evaluation.features.clip import clip_score
from ldm.evaluation.metrics.frechet import frechet_distance, frechet_estimate
from ldm.evaluation.metrics.inception_score import inception_score
from ldm.evaluation.metrics.intervals import (
    Estimate,
    Interval,
    bootstrap_mean,
    jackknife,
    wilson_interval,
)
from ldm.evaluation.metrics.kernel_distances import cmmd, kid
from ldm.evaluation.metrics.moments import Moments
from ldm.evaluation.metrics.precision_recall import Manifold

SCORES_SEED = 0  # of KID's subsets, the score's splits, and what intervals draw
KID_SUBSET_SIZE = 1000  # KID's, or half of the smaller side


class Scores:
    """What pictures are compared with, through each network, and how.

    real (M, D) and floor (N', D) by network: real pictures, and those of the painted captions,
    which a perfect model would paint. texts (N, D) by network, where it knows captions, and
    floor_texts (N', D) of the floor's own. The nearest-neighbour metrics and KID are of the
    `first` network: of Inception, where it is there.
    """

    def __init__(
        self,
        networks: Sequence[FeatureExtractor],
        real: Mapping[str, Tensor],
        floor: Mapping[str, Tensor],
        texts: Mapping[str, Tensor],
        floor_texts: Mapping[str, Tensor],
    ) -> None:
        self.real, self.floor, self.texts, self.floor_texts = real, floor, texts, floor_texts
        self.first = choose_main_network(networks)
        self.moments = {name: Moments.of(table) for name, table in real.items()}
        self.manifold = Manifold(real[self.first])
        self.logits: Callable[[Tensor], Tensor] | None = None
        for network in networks:
            if network.name == "inception":
                self.logits = network.logits
        self._floor_frechet = self._frechet(floor, errors=False)
        self.constant = self._constant()

    def metrics(self, seen: Mapping[str, Tensor]) -> dict[str, float]:
        """Of painted pictures' tables (N, D): `distances`, and clip_score where there is a CLIP.

        Beside them what does not depend on them: fid_floor and fd_*_floor, clip_score_real (real
        pictures with their own captions) and, of these pictures, clip_score_chance (with all the
        captions but their own).
        """
        return self.compute_distances(seen) | self._agreement(seen) | self.constant

    def estimate_metrics(
        self, seen: Mapping[str, Tensor]
    ) -> tuple[dict[str, float], dict[str, Interval]]:
        """`metrics`, and 95 % intervals for painting as many other pictures, by metric."""
        estimates = self._frechet(seen, errors=True) | self._others(seen, errors=True)
        intervals = {name: estimate.interval() for name, estimate in estimates.items()}
        low, high = intervals["density"]
        intervals["density"] = Interval(max(low, 0.0), high)
        intervals["precision"] = wilson_interval(
            estimates["precision"].value, len(seen[self.first])
        )
        for name in ("recall", "coverage"):
            intervals[name] = estimates[name].share_interval(len(self.real[self.first]))
        for name, texts in self.texts.items():
            intervals[clip_score_key(name)] = bootstrap_mean(
                clip_score(seen[name], texts), seed=SCORES_SEED
            )
        found = _values(estimates) | self._inception_score(seen)
        return found | self._agreement(seen) | self.constant, intervals

    def compute_distances(self, seen: Mapping[str, Tensor]) -> dict[str, float]:
        """fid (Inception) or fd_<network>, kid, precision, recall, density, coverage, cmmd."""
        estimates = self._frechet(seen, errors=False) | self._others(seen, errors=False)
        return _values(estimates) | self._inception_score(seen)

    @cached_property
    def floor_distances(self) -> dict[str, float]:
        """`distances` of the real pictures of the painted captions: what a perfect model gets."""
        estimates = self._floor_frechet | self._others(self.floor, errors=False)
        return _values(estimates) | self._inception_score(self.floor)

    def _frechet(self, seen: Mapping[str, Tensor], *, errors: bool) -> dict[str, Estimate]:
        """Errors cost more, and are NaN where they are not wanted."""
        return {
            distance_key(name): frechet_estimate(moments, seen[name])
            if errors
            else Estimate(frechet_distance(moments, Moments.of(seen[name])), math.nan)
            for name, moments in self.moments.items()
        }

    def _others(self, seen: Mapping[str, Tensor], *, errors: bool) -> dict[str, Estimate]:
        """All other distances; errors as above."""
        first, real = seen[self.first], self.real[self.first]
        of_subsets = kid(real, first, seed=SCORES_SEED, subset_size=self._subset(first))
        found = {"kid": Estimate(of_subsets.mean, of_subsets.error)}
        if errors:
            groups = max(2, min(20, len(first) // 8))
            found |= jackknife(self.manifold.compare, first, seed=SCORES_SEED, groups=groups)
        else:
            shares = self.manifold.compare(first)
            found |= {name: Estimate(value, math.nan) for name, value in shares.items()}
        if "clip" in seen:
            found["cmmd"] = cmmd(self.real["clip"], seen["clip"])
        return found

    def _inception_score(self, seen: Mapping[str, Tensor]) -> dict[str, float]:
        if self.logits is None:
            return {}
        chances = self.logits(seen["inception"]).softmax(dim=1)
        splits = min(10, len(chances) // 2)
        return {"inception_score": inception_score(chances, seed=SCORES_SEED, splits=splits).mean}

    def _agreement(self, seen: Mapping[str, Tensor]) -> dict[str, float]:
        """With the captions, and with those of others."""
        found = {}
        for name, texts in self.texts.items():
            found[clip_score_key(name)] = float(clip_score(seen[name], texts).mean())
            found[f"{clip_score_key(name)}_chance"] = _chance(seen[name], texts)
        return found

    def _subset(self, painted: Tensor) -> int:
        return min(KID_SUBSET_SIZE, len(painted) // 2, len(self.real[self.first]) // 2)

    def _constant(self) -> dict[str, float]:
        found = {f"{name}_floor": value for name, value in _values(self._floor_frechet).items()}
        for name, texts in self.floor_texts.items():
            own = clip_score(self.floor[name], texts)
            found[f"{clip_score_key(name)}_real"] = float(own.mean())
        return found


def _values(estimates: Mapping[str, Estimate]) -> dict[str, float]:
    return {name: estimate.value for name, estimate in estimates.items()}


def choose_main_network(networks: Sequence[FeatureExtractor]) -> str:
    """The network of the metrics that bear no network's name."""
    names = [network.name for network in networks]
    return "inception" if "inception" in names else names[0]


def distance_key(network: str) -> str:
    """A Frechet distance is called FID on Inception's features alone."""
    return "fid" if network == "inception" else f"fd_{network}"


def clip_score_key(network: str) -> str:
    """clip_score, or another name for another CLIP beside it."""
    return "clip_score" if network == "clip" else f"clip_score_{network}"


def _chance(images: Tensor, texts: Tensor) -> float:
    """The mean CLIP score of all pairs that are none."""
    images, texts = normalize(images.double()), normalize(texts.double())
    total = sum(float((part @ texts.T).clamp(min=0).sum()) for part in images.split(1024))
    own = float((images * texts).sum(dim=1).clamp(min=0).sum())
    return 100 * (total - own) / (len(images) * (len(images) - 1))
