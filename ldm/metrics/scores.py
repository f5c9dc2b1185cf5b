"""Tables of features to metrics: distances to real pictures, and agreement with captions.

Shapes: N painted pictures, M real ones, D features.
"""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from torch.nn.functional import normalize

from ldm.metrics.clip_features import clip_score
from ldm.metrics.features import Features
from ldm.metrics.frechet import frechet_distance, frechet_estimate
from ldm.metrics.inception_score import inception_score
from ldm.metrics.intervals import Interval, bootstrap_mean, jackknife
from ldm.metrics.kernels import cmmd, kid
from ldm.metrics.manifold import Manifold
from ldm.metrics.moments import Moments

SEED = 0  # of KID's subsets, the score's splits, and what intervals draw
SUBSET = 1000  # KID's, or half of the smaller side


class Scores:
    """What pictures are compared with, through each network, and how.

    real (M, D) and floor (N', D) by network: real pictures, and those of the painted captions,
    which a perfect model would paint. texts (N, D) by network, where it knows captions, and
    floor_texts (N', D) of the floor's own. The nearest-neighbour metrics and KID are of the
    `first` network: of Inception, where it is there.
    """

    def __init__(
        self,
        networks: Sequence[Features],
        real: Mapping[str, Tensor],
        floor: Mapping[str, Tensor],
        texts: Mapping[str, Tensor],
        floor_texts: Mapping[str, Tensor],
    ) -> None:
        self.real, self.floor, self.texts, self.floor_texts = real, floor, texts, floor_texts
        self.first = first(networks)
        self.moments = {name: Moments.of(table) for name, table in real.items()}
        self.manifold = Manifold(real[self.first])
        self.logits: Callable[[Tensor], Tensor] | None = None
        for network in networks:
            if network.name == "inception":
                self.logits = network.logits
        self.constant = self._constant()

    def metrics(self, seen: Mapping[str, Tensor]) -> dict[str, float]:
        """Of painted pictures' tables (N, D): `distances`, and clip_score where there is a CLIP.

        Beside them what does not depend on them: fid_floor and fd_*_floor, clip_score_real (real
        pictures with their own captions) and, of these pictures, clip_score_chance (with all the
        captions but their own).
        """
        found = self.distances(seen)
        for name, texts in self.texts.items():
            scores = clip_score(seen[name], texts)
            found[score_key(name)] = float(scores.mean())
            found[f"{score_key(name)}_chance"] = _chance(seen[name], texts)
        return found | self.constant

    def distances(self, seen: Mapping[str, Tensor]) -> dict[str, float]:
        """fid (Inception) or fd_<network>, kid, precision, recall, density, coverage, cmmd."""
        found = {
            distance_key(name): frechet_distance(moments, Moments.of(seen[name]))
            for name, moments in self.moments.items()
        }
        first = seen[self.first]
        found["kid"] = kid(
            self.real[self.first], first, seed=SEED, subset_size=self._subset(first)
        )[0]
        found |= self.manifold.compare(first)
        if "clip" in seen:
            found["cmmd"] = cmmd(self.real["clip"], seen["clip"]).value
        if self.logits is not None:
            chances = self.logits(seen["inception"]).softmax(dim=1)
            splits = min(10, len(chances) // 2)
            found["inception_score"] = inception_score(chances, seed=SEED, splits=splits).mean
        return found

    def intervals(self, seen: Mapping[str, Tensor]) -> dict[str, Interval]:
        """95 % intervals for painting as many other pictures, by metric."""
        found = {
            distance_key(name): frechet_estimate(moments, seen[name]).interval()
            for name, moments in self.moments.items()
        }
        first = seen[self.first]
        real = self.real[self.first]
        value, _, error = kid(real, first, seed=SEED, subset_size=self._subset(first))
        found["kid"] = Interval(value - 1.96 * error, value + 1.96 * error)
        groups = jackknife(
            self.manifold.compare, first, seed=SEED, groups=max(2, min(20, len(first) // 8))
        )
        for name, estimate in groups.items():  # shares, but for the density
            low, high = estimate.interval()
            found[name] = Interval(max(low, 0.0), high if name == "density" else min(high, 1.0))
        if "clip" in seen:
            found["cmmd"] = cmmd(self.real["clip"], seen["clip"]).interval()
        for name, texts in self.texts.items():
            found[score_key(name)] = bootstrap_mean(clip_score(seen[name], texts), seed=SEED)
        return found

    def _subset(self, painted: Tensor) -> int:
        return min(SUBSET, len(painted) // 2, len(self.real[self.first]) // 2)

    def _constant(self) -> dict[str, float]:
        found = {}
        for name, moments in self.moments.items():
            floor = frechet_distance(moments, Moments.of(self.floor[name]))
            found[f"{distance_key(name)}_floor"] = floor
        for name, texts in self.floor_texts.items():
            own = clip_score(self.floor[name], texts)
            found[f"{score_key(name)}_real"] = float(own.mean())
        return found


def first(networks: Sequence[Features]) -> str:
    """The network of the metrics that bear no network's name."""
    names = [network.name for network in networks]
    return "inception" if "inception" in names else names[0]


def distance_key(network: str) -> str:
    """A Frechet distance is called FID on Inception's features alone."""
    return "fid" if network == "inception" else f"fd_{network}"


def score_key(network: str) -> str:
    """clip_score, or another name for another CLIP beside it."""
    return "clip_score" if network == "clip" else f"clip_score_{network}"


def _chance(images: Tensor, texts: Tensor) -> float:
    """The mean CLIP score of all pairs that are none."""
    images, texts = normalize(images.double()), normalize(texts.double())
    total = sum(float((part @ texts.T).clamp(min=0).sum()) for part in images.split(1024))
    own = float((images * texts).sum(dim=1).clamp(min=0).sum())
    return 100 * (total - own) / (len(images) * (len(images) - 1))
