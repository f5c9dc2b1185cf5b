"""What measuring the quality of images costs.

    python -m benchmarks.evaluation                  # all rows, 3 rounds
    python -m benchmarks.evaluation --only scores --rounds 7
    python -m benchmarks.evaluation --quick          # does it run?

Rows: features of 1000 pictures of 64 x 64 pixels and of 1000 captions; the Frechet distance of
2048-d features beside torchmetrics and SciPy, where `root kept` is that of a later comparison with
the same real images; all quality scores of 1000 pictures against 5000 real ones, with and without
95 % intervals, for features as wide as EfficientNet's (1280) and as the packaged CLIP's (128).
Features are random numbers of a decaying spectrum. Numbers are CPU seconds; low and high are
quartiles. The differences to torchmetrics and SciPy are printed as well.
"""

from collections.abc import Callable
from types import SimpleNamespace

from benchmarks import harness

WIDTHS = {"efficientnet": 1280, "clip": 128}


def main(words: list[str] | None = None) -> None:
    """Measures the rows."""
    parser = harness.make_parser("evaluation", __doc__, rounds=3)
    harness.add_only(parser)
    parser.add_argument("--pictures", type=int, default=1000, help="generated (default: 1000)")
    parser.add_argument("--real", type=int, default=5000, help="real (default: 5000)")
    args = harness.parse(parser, words)
    width = 2048
    if args.quick:
        args.pictures, args.real, width = 24, 48, 32
    from ldm.utils.allocator import reuse_freed_memory

    reuse_freed_memory()  # as in ldm.evaluate
    distances: dict[str, float] = {}
    variants = list_features(args.pictures) if not args.quick else {}
    variants |= list_frechet(args.pictures, args.real, width, distances)
    for network, own in WIDTHS.items():
        variants |= list_scores(network, args.pictures, args.real, min(own, width))
    seconds = harness.race(
        harness.select(variants, args, parser), rounds=args.rounds, title="evaluation", warm_up=0
    )
    rows = [harness.summarize(name, values, unit="CPU s") for name, values in seconds.items()]
    report = harness.Report(args, pictures=args.pictures, real=args.real)
    report.add(f"evaluation, {args.pictures} pictures, {args.real} real ones", rows)
    if ours := distances.get("frechet, first"):
        found = [
            {"what": name, "distance": value, "relative difference": abs(value / ours - 1)}
            for name, value in distances.items()
        ]
        report.add("Frechet distances", found)


def make_features(count: int, width: int, seed: int):
    """Returns random features (count, width), float32, of a decaying spectrum."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, width + 1) ** -0.5
    return torch.randn(count, width, generator=generator) * scale + 0.01 * seed


def list_features(count: int) -> dict[str, Callable]:
    """Returns the rows of the networks."""
    import torch

    from ldm.evaluation.features.clip import ClipFeatures
    from ldm.evaluation.features.efficientnet import EfficientNetFeatures

    images = torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8)
    captions = [f"a small red circle left of a big blue star {i % 9}" for i in range(count)]
    clip, net = ClipFeatures(), EfficientNetFeatures()
    return {
        "features, efficientnet": lambda: harness.discard(net(images)),
        "features, clip": lambda: harness.discard(clip(images)),
        "captions, clip": lambda: harness.discard(clip.encode_texts(captions)),
    }


def list_frechet(
    count: int, real: int, width: int, distances: dict[str, float]
) -> dict[str, Callable]:
    """Returns the rows of the Frechet distance; `distances` gets what each of them finds."""
    import numpy as np
    from scipy.linalg import sqrtm
    from torchmetrics.image.fid import _compute_fid

    from ldm.evaluation.metrics.frechet import frechet_distance, frechet_estimate
    from ldm.evaluation.metrics.moments import Moments

    features = make_features(real, width, 0)
    reference, generated = Moments.of(features), Moments.of(make_features(real, width, 1))
    kept = Moments.of(features)
    frechet_distance(kept, generated)

    def note(name: str, value: object) -> None:
        distances[name] = float(value)

    def scipy_distance() -> float:
        a, b = reference.covariance().numpy(), generated.covariance().numpy()
        apart = (reference.mean - generated.mean).square().sum()
        return apart + np.trace(a) + np.trace(b) - 2 * np.trace(sqrtm(a @ b).real)

    def torchmetrics_distance():
        pairs = [(each.mean, each.covariance()) for each in (reference, generated)]
        return _compute_fid(*pairs[0], *pairs[1])

    def first_distance() -> float:
        fresh = Moments(reference.count, reference.mean, reference.scatter)
        return frechet_distance(fresh, generated)

    few, many = make_features(count, width, 1), make_features(real, width, 1)
    return {
        "moments": lambda: harness.discard(Moments.of(features)),
        "frechet, first": lambda: note("frechet, first", first_distance()),
        "frechet, root kept": lambda: note("frechet, root kept", frechet_distance(kept, generated)),
        "frechet, torchmetrics": lambda: note("frechet, torchmetrics", torchmetrics_distance()),
        "frechet, scipy": lambda: note("frechet, scipy", scipy_distance()),
        f"frechet with error, {count} rows": lambda: harness.discard(frechet_estimate(kept, few)),
        f"frechet with error, {real} rows": lambda: harness.discard(frechet_estimate(kept, many)),
    }


def list_scores(network: str, count: int, real: int, width: int) -> dict[str, Callable]:
    """Returns the rows of all quality scores."""
    make, generated = prepare_scores(network, count, real, width)
    scores = make()
    estimate = scores.estimate_metrics
    return {
        f"scores, {width}-d, set-up": lambda: harness.discard(make()),
        f"scores, {width}-d, values": lambda: harness.discard(scores.metrics(generated)),
        f"scores, {width}-d, with intervals": lambda: harness.discard(estimate(generated)),
    }


def prepare_scores(network: str, count: int, real: int, width: int):
    """Returns what makes the scores of `real` pictures, and tables of `count` generated ones."""
    from ldm.evaluation.scores import Scores

    networks = [SimpleNamespace(name=network, width=width, digest="")]
    references = {network: make_features(real, width, 0)}
    floor = {network: make_features(count, width, 2)}

    def make() -> Scores:
        return Scores(networks, references, floor, {}, {})

    return make, {network: make_features(count, width, 1)}


if __name__ == "__main__":
    main()
