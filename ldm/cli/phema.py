"""python -m ldm.phema ckpt=runs/my-run [lengths=0.05,0.1,0.2 | length=0.13]; see --help."""

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from ldm.cli import evaluate
from ldm.config import command_line
from ldm.config.ranges import LENGTH
from ldm.config.sample_options import check_places
from ldm.config.suggestions import nearest
from ldm.experiments import curves, run_dir
from ldm.utils.errors import UsageError
from ldm.utils.files import check_length, located, reserve
from ldm.utils.hashing import hash_module
from ldm.utils.text import often

TEXTS = (
    *("ckpt", "lengths", "metric", "data", "others", "subset", "out"),
    *("autoencoder", "text_encoder"),
)
ROUGH = 0.1  # misfit from which on a length is said to be approximate
FIRST = ("scene_accuracy", "clip_score")  # what decides where no metric is asked for


def main() -> None:
    """Compose, then make averages."""
    texts = command_line.take_text(TEXTS)

    @hydra.main(config_path=command_line.CONF, config_name="phema", version_base="1.3")
    def composed(cfg: DictConfig) -> None:
        asked = {name: cfg[name] for name in TEXTS} | texts
        with command_line.told_plainly():
            choose(cfg, asked)

    command_line.run(composed, "phema", goes_on=True)


def choose(cfg: DictConfig, asked: dict[str, str | None]) -> None:
    """Store the average of `length`; without one that of `lengths` which measures best."""
    tried = lengths(asked["lengths"])
    check_places(cfg, command_line.needed(asked, "ckpt"))
    run = opened(command_line.needed(asked, "ckpt"))
    out = target(asked["out"], run)
    new = asked["out"] is not None and not cfg.overwrite
    if cfg.length is not None:
        average = run.average(cfg.length)
        out = run.save(average, out, {}, new=new)
        if run_dir.rank() == 0:
            print(out)
        return
    if not cfg.overwrite:
        try:
            curves.check_place([{"varied": {"length": None}}], run.home)
        except ValueError as error:
            raise UsageError(f"{error}: move it, or give overwrite=true") from error
    scan(cfg, asked, run, tried, out, new=new)


def lengths(text: str) -> list[float]:
    """0.05,0.1 or [0.05,0.1] as numbers, the shortest first; UsageError where they are none."""
    found = [run_dir.number(word) for word in str(text).strip("[] ").split(",")]
    if not all(map(LENGTH.accepts, found)):
        raise UsageError(
            f"lengths={text}: each must be {LENGTH}; they are written lengths=0.05,0.1,0.15"
        )
    return sorted(set(found))


def target(out: str | None, run: "Run") -> Path:
    """Where the average goes; UsageError for a name that is a training checkpoint's."""
    path = located(out or os.path.relpath(run.path.with_name("phema.ckpt")))
    check_length("out", path, more=len("-000.json"))
    if path.suffix != ".ckpt" or path.name.startswith("step=") or path.stem in ("last", "best"):
        raise UsageError(
            f"out={path}: give a name of its own that ends in .ckpt; step=*, last and best are "
            "what train.py goes on from"
        )
    return path


@dataclass
class Average:
    """An average that nobody kept: its weights by name, and how they came about."""

    state: dict
    facts: dict


@dataclass
class Run:
    """A checkpoint of a run, and the snapshots of its averages up to that step."""

    path: Path
    payload: dict
    snapshots: list

    @property
    def home(self) -> Path:
        """The run's directory."""
        return Path(os.path.relpath(self.path.parent.parent))

    @property
    def step(self) -> int:
        """The step that averages are made for: that of the last snapshot."""
        return self.snapshots[-1].step

    def average(self, length: float) -> Average:
        """The average of this length at the last snapshot.

        Raises ValueError for a length out of range, CheckpointError where the snapshots are of
        another network than the checkpoint.
        """
        from tqdm import tqdm

        from ldm.training.power_ema import Profile, mixture
        from ldm.utils import checkpoint_file
        from ldm.utils import ema_files as snapshots

        kept = [Profile(one.length, one.step) for one in self.snapshots]
        made = mixture(kept, Profile(length, self.step))
        if made.misfit > ROUGH and run_dir.rank() == 0:
            print(
                f"length={length:g} is approximate: the nearest sum of snapshots is off its "
                f"profile by {made.misfit:.0%}. More of them (a smaller phema.every) come nearer, "
                "and so does a kept length that is nearer to it (phema.lengths)"
            )
        how = {"disable": run_dir.rank() != 0, "mininterval": often()}
        with tqdm(total=len(kept), desc="Averaging", **how) as bar:
            state = snapshots.mixed(self.snapshots, made.shares, done=bar.update)
        own = checkpoint_file.part(self.payload, "ema.module.")
        if {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in own.items()}:
            folder = self.snapshots[-1].path.parent
            raise checkpoint_file.CheckpointError(
                f"the snapshots in {folder} are of another network than {self.path}"
            )
        facts = {"length": length, "step": self.step}
        return Average(state, {**facts, "snapshots": len(kept), "misfit": made.misfit})

    def save(self, average: Average, out: Path, measured: dict, *, new: bool) -> Path:
        """A checkpoint that is sampled and evaluated like any other, and that no run goes on from.

        new: one that replaces none, under a name with a number where `out` is there already.
        Raises OSError where it cannot be written.
        """
        from ldm.utils import checkpoint_file

        if run_dir.rank() != 0:
            return out
        places = ("denoiser.", "ema.module.")
        both = {f"{place}{name}": t for place in places for name, t in average.state.items()}
        facts = {**self.payload["ldm"], "phema": {**average.facts, **measured}}
        with reserve(lambda n: [out.with_stem(out.stem + n)], overwrite=not new) as [path]:
            checkpoint_file.write(
                {"state_dict": both, "global_step": self.step, "ldm": facts}, path
            )
        return path


def opened(ckpt: str) -> Run:
    """The run that `ckpt`, its directory or a checkpoint in it, stands for.

    Raises CheckpointError where there is no checkpoint, UsageError where there are no snapshots.
    """
    from ldm.utils import checkpoint_file
    from ldm.utils import ema_files as snapshots
    from ldm.utils.checkpoint_facts import read_facts

    path = checkpoint_file.find(ckpt).resolve()
    payload = checkpoint_file.read(path)
    if "phema" in read_facts(payload, path):
        raise UsageError(f"{path} is such an average already: give its run, ckpt=RUN")
    folder = path.parent.parent / "phema"
    keeps = checkpoint_file.part(
        payload, "phema."
    )  # else the folder is of another run by this name
    found = snapshots.find(folder, until=payload["global_step"]) if keeps else []
    if not found:
        raise UsageError(
            f"there are no snapshots of averages up to step {payload['global_step']} in {folder}: "
            "they are kept by a run that is begun with, say, phema.lengths='[0.05,0.10]'"
        )
    return Run(path, payload, found)


def scan(
    cfg: DictConfig,
    asked: dict[str, str | None],
    run: Run,
    tried: list[float],
    out: Path,
    *,
    new: bool,
) -> None:
    """Measure each length, draw the curve, store the best average.

    Raises UsageError for a metric that is not measured.
    """
    from ldm.config import evaluation
    from ldm.utils import checkpoint_file

    cfg = OmegaConf.merge({"raw": False}, cfg)
    asked = {**asked, "ckpt": str(run.path), "images": None, "keep": None}
    source, first = evaluation.source(cfg, asked, kind="run"), run_dir.rank() == 0
    points, waiting, own, metric = [], [], {}, asked["metric"]
    whole = [None, *tried] if run.step == run.payload["global_step"] else tried
    for length in whole:
        label = "as trained" if length is None else f"{length:g}"
        if first:
            print(f"length={label}", flush=True)
        measuring = source
        if length is not None:
            average = run.average(length)
            checkpoint_file.load_into(source.network, average.state, what=str(run.path))
            facts = {**average.facts, "digest": hash_module(source.network)}
            measuring = replace(source, facts=lambda cfg, facts=facts: of(source.facts(cfg), facts))
        found, pieces = evaluate.measured(measuring, cfg, {"length": label}, asked)
        waiting.append(pieces)
        metric = chosen(metric, found["metrics"])
        if length is None:
            own = found["metrics"]
        else:
            points.append({**found, "own": own})
    if not first:
        return
    best = pick(points, metric)
    value = best["metrics"][metric]
    average = run.average(best["phema"]["length"])
    out = run.save(average, out, {"metric": metric, "value": value}, new=new)
    written = curves.write(points, run.home, metric=metric)
    print(f"{curves.table(points, metric=metric)}\n{verdict(points, best, metric)}")
    print("  ".join(map(str, [*written, out])))
    for pieces in waiting:
        shutil.rmtree(pieces, ignore_errors=True)


def of(known: dict, facts: dict) -> dict:
    """What is known of a run's own weights, turned to an average's."""
    settings = {**known["settings"], "weights": "phema"}
    return {**known, "step": facts["step"], "settings": settings, "phema": facts}


def chosen(metric: str | None, measured: dict[str, float]) -> str:
    """The metric to go by; UsageError where it is not measured."""
    if metric is None:
        there = [FIRST[0], curves.distance(measured), *FIRST[1:], *measured]
        return next(name for name in there if name in measured)
    if (name := metric.removeprefix("val/")) not in measured:
        near = nearest(name, measured)
        raise UsageError(f"metric={metric} is not measured{near} There are: {', '.join(measured)}")
    return name


def pick(points: list[dict], metric: str) -> dict:
    """The point with the best value; of equal ones the shortest length."""
    sign = 1 if run_dir.direction(metric) == "minimize" else -1
    return min(points, key=lambda point: sign * point["metrics"][metric])


def verdict(points: list[dict], best: dict, metric: str) -> str:
    """What was found, in words."""
    said = f"best: length={best['varied']['length']}, {metric} {best['metrics'][metric]:.4g}"
    if own := best["own"]:
        said += f" (the average as trained: {own[metric]:.4g})"
    if len({point["metrics"][metric] for point in points}) == 1 < len(points):
        said += "; all are alike"
    elif len(points) > 1 and best in (points[0], points[-1]):
        said += "; it is the last of those tried, and others beyond it may be better"
    return said


if __name__ == "__main__":
    main()
