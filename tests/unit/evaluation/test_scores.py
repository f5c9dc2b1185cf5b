"""Which numbers there are, under which names, and what stands beside them.

The formulas are tested where they are: test_frechet, test_kernels, test_manifold, test_intervals.
"""

from dataclasses import dataclass

import pytest
import torch
from gaussians import gaussian_rows
from torch import Tensor

from ldm.evaluation import scores as module
from ldm.evaluation.metrics.clip_score import clip_score
from ldm.evaluation.metrics.frechet import frechet_distance
from ldm.evaluation.metrics.inception_score import inception_score
from ldm.evaluation.metrics.kernel_distances import KernelDistances
from ldm.evaluation.metrics.moments import Moments
from ldm.evaluation.metrics.precision_recall import Manifold
from ldm.evaluation.scores import Scores

M, N, D = 60, 40, 8


@dataclass
class Network:
    """A feature extractor, of which only the name is used."""

    name: str
    width: int = D
    digest: str = ""

    def __call__(self, images: Tensor) -> Tensor:
        raise NotImplementedError


class Classifier(Network):
    """A feature extractor with a classifier."""

    def logits(self, features: Tensor) -> Tensor:
        return features[:, :4] * 2


def rows(count: int, seed: int, **more) -> Tensor:
    return gaussian_rows(count, D, seed=seed, **more).float()


def scores(*names: str, captioned: tuple[str, ...] = (), real_count: int = M) -> Scores:
    return Scores(
        [(Classifier if name == "inception" else Network)(name) for name in names],
        {name: rows(real_count, 1) for name in names},
        {name: rows(N, 2) for name in names},
        {name: rows(N, 3) for name in captioned},
        {name: rows(N, 4) for name in captioned},
    )


def seen(*names: str) -> dict[str, Tensor]:
    return {name: rows(N, 5 + i, shift=1.0) for i, name in enumerate(names)}


def between(a: Tensor, b: Tensor) -> float:
    return frechet_distance(Moments.of(a), Moments.of(b))


def test_a_clip_alone():
    painted = seen("clip")
    found = scores("clip", captioned=("clip",)).metrics(painted)
    table = painted["clip"]
    expected = {
        "fd_clip": between(rows(M, 1), table),
        "kid": KernelDistances(rows(M, 1)).kid(table, seed=0, subset_size=20).value,
        **Manifold(rows(M, 1)).compare(table),
        "cmmd": KernelDistances(rows(M, 1)).cmmd(table).value,
        "clip_score": float(clip_score(table, rows(N, 3)).mean()),
        "clip_score_chance": chance(table, rows(N, 3)),
        "fd_clip_floor": between(rows(M, 1), rows(N, 2)),
        "clip_score_real": float(clip_score(rows(N, 2), rows(N, 4)).mean()),
    }
    assert found == pytest.approx(expected, rel=1e-6)
    assert list(found) == list(expected), "as they are read"


def chance(images: Tensor, texts: Tensor) -> float:
    """Every picture with every caption but its own, one by one."""
    found = [
        float(clip_score(images[i : i + 1], texts[j : j + 1]))
        for i in range(len(images))
        for j in range(len(texts))
        if i != j
    ]
    return sum(found) / len(found)


def test_only_inceptions_distance_is_called_fid():
    painted = seen("clip", "inception", "dinov2")
    one = scores("clip", "inception", "dinov2", captioned=("clip",))
    found = one.metrics(painted)
    distances = {name for name in found if name.startswith(("fd_", "fid"))}
    of = {"fd_clip", "fid", "fd_dinov2"}
    assert distances == of | {f"{name}_floor" for name in of}
    table = painted["inception"]
    assert found["fid"] == pytest.approx(between(rows(M, 1), table))
    # Inception's, though it is not the first that was named.
    assert found["kid"] == pytest.approx(
        KernelDistances(rows(M, 1)).kid(table, seed=0, subset_size=20).value
    )
    assert found["coverage"] == Manifold(rows(M, 1)).compare(table)["coverage"]
    chances = (table[:, :4] * 2).softmax(dim=1)
    expected = inception_score(chances, seed=0, splits=10)
    assert found["inception_score"] == pytest.approx(expected)


def test_without_captions_there_is_no_clip_score():
    one = scores("efficientnet", "clip")
    found = one.metrics(seen("efficientnet", "clip"))
    assert not any("clip_score" in name for name in found)
    assert {"fd_efficientnet", "fd_clip", "cmmd"} < found.keys()
    assert found.keys() >= one.estimate_metrics(seen("efficientnet", "clip"))[1].keys()


def test_another_clip_has_a_score_of_its_own():
    found = scores("clip", "clip_l14", captioned=("clip", "clip_l14")).metrics(
        seen("clip", "clip_l14")
    )
    names = [name for name in found if name.startswith("clip_score")]
    assert sorted(names) == sorted(
        f"clip_score{which}{suffix}"
        for which in ("", "_clip_l14")
        for suffix in ("", "_chance", "_real")
    )


def test_real_pictures_in_place_of_painted_ones_get_the_floor():
    one = scores("clip")
    found = one.metrics(one.floor)
    assert found["fd_clip"] == pytest.approx(found["fd_clip_floor"], rel=1e-9)
    assert one.compute_distances(one.floor)["fd_clip"] == pytest.approx(found["fd_clip"])
    same = one.compute_distances(one.real)
    assert same["fd_clip"] == pytest.approx(0, abs=1e-6)
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)


def test_what_is_measured_twice_is_the_same():
    one, painted = scores("clip", captioned=("clip",)), seen("clip")
    torch.manual_seed(1)
    first = one.metrics(painted), one.estimate_metrics(painted)
    torch.manual_seed(2)
    assert (one.metrics(painted), one.estimate_metrics(painted)) == first


def test_what_takes_long_is_computed_once(monkeypatch):
    """KID, and the Frechet distances of the painted pictures and of the floor."""
    calls = []
    for place, name in (
        *((KernelDistances, name) for name in ("kid", "cmmd")),
        *((module, name) for name in ("frechet_distance", "frechet_estimate")),
    ):
        own = getattr(place, name)

        def counted(*given, own=own, name=name, **more):
            calls.append(name)
            return own(*given, **more)

        monkeypatch.setattr(place, name, counted)
    one = scores("clip", captioned=("clip",))
    one.estimate_metrics(seen("clip"))
    assert sorted(calls) == ["cmmd", "frechet_distance", "frechet_estimate", "kid"]
    calls.clear()
    floor = one.floor_distances
    assert one.floor_distances is floor
    assert sorted(calls) == ["cmmd", "kid"]
    assert floor == one.compute_distances(one.floor)
    assert floor["fd_clip"] == one.constant["fd_clip_floor"]


def test_intervals_hold_what_is_measured():
    names = ("clip", "inception")
    one, painted = scores(*names, captioned=("clip",)), seen(*names)
    found, intervals = one.estimate_metrics(painted)
    metrics = one.metrics(painted)  # the same by another way, in a run
    assert found == pytest.approx(metrics, rel=1e-9)
    assert list(found) == list(metrics)
    assert intervals.keys() == {
        *("fd_clip", "fid", "kid", "precision", "recall", "density", "coverage"),
        *("cmmd", "clip_score"),
    }
    for name, (low, high) in intervals.items():
        assert low < found[name] < high, name


@pytest.mark.parametrize(("painted", "real"), [(8, 8), (9, 30), (30, 8)])
def test_few_pictures_are_enough(painted, real):
    """As few as Quality lets through, and pictures that are all alike."""
    one = scores("clip", "inception", real_count=real)
    for table in (rows(painted, 9), rows(1, 9).expand(painted, -1)):
        tables = {"clip": table, "inception": table}
        found = one.metrics(tables)
        assert all(value == value for value in found.values()), found
        for name, (low, high) in one.estimate_metrics(tables)[1].items():
            assert low <= high, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "real", "count", "spread"), [(16, 400, 150, 0.8), (64, 300, 200, 0.7)]
)
def test_intervals_hold_the_shares_of_neighbours(width, real, count, spread):
    """Over sets drawn anew: precisions of 0.973 and 0.9998, coverages of 0.931 and 0.995."""
    fixed = gaussian_rows(real, width, seed=1)
    compared = Scores([Network("f")], {"f": fixed}, {"f": fixed}, {}, {})
    draws = [gaussian_rows(count, width, seed=seed, spread=spread) for seed in range(2, 402)]
    values = [compared.manifold.compare(rows) for rows in draws]
    found = [compared.estimate_metrics({"f": rows})[1] for rows in draws[:200]]
    for name in ("precision", "recall", "coverage"):
        truth = sum(one[name] for one in values) / len(values)
        inside = [one[name].low <= truth <= one[name].high for one in found]
        assert sum(inside) / len(inside) >= 0.925, name  # 0.95 but for the chance of 200 draws
