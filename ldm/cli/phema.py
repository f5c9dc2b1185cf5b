"""python -m ldm.phema ckpt=runs/my-run [lengths=0.05,0.1,0.2 | length=0.13]; see --help."""

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from ldm.cli.evaluate import measure_point
from ldm.config import command_line
from ldm.config.command_line import (
    convert_to_usage_errors,
    pop_text_options,
    require_option,
    run_command,
)
from ldm.config.ranges import EMA_LENGTH_RANGE
from ldm.config.sample_options import check_checkpoints_and_device
from ldm.experiments.curves import (
    check_curve_files,
    format_curve_table,
    select_distance_metric,
    write_curve,
)
from ldm.experiments.run_dir import get_launcher_rank, infer_metric_direction, parse_number
from ldm.utils.errors import UsageError, suggest_nearest
from ldm.utils.files import check_path_length, reserve_files, resolve_path
from ldm.utils.hashing import hash_module
from ldm.utils.text import get_progress_interval

PHEMA_TEXT_OPTIONS = (
    *("ckpt", "lengths", "metric", "data", "others", "subset", "out"),
    *("autoencoder", "text_encoder"),
)
APPROXIMATE_MISFIT = 0.1  # misfit from which on a length is said to be approximate
PREFERRED_METRICS = ("scene_accuracy", "clip_score")  # what decides where no metric is asked for


def main() -> None:
    """Compose, then make averages."""
    texts = pop_text_options(PHEMA_TEXT_OPTIONS)

    @hydra.main(config_path=command_line.CONF_DIR, config_name="phema", version_base="1.3")
    def composed(cfg: DictConfig) -> None:
        asked = {name: cfg[name] for name in PHEMA_TEXT_OPTIONS} | texts
        with convert_to_usage_errors():
            synthesize_ema(cfg, asked)

    run_command(composed, "phema", resumable=True)


def synthesize_ema(cfg: DictConfig, options: dict[str, str | None]) -> None:
    """Store the average of `length`; without one that of `lengths` which measures best."""
    tried = parse_ema_lengths(options["lengths"])
    check_checkpoints_and_device(cfg, require_option(options, "ckpt"))
    run = load_snapshot_run(require_option(options, "ckpt"))
    out = resolve_average_path(options["out"], run)
    new = options["out"] is not None and not cfg.overwrite
    if cfg.length is not None:
        average = run.average(cfg.length)
        out = run.save(average, out, {}, new=new)
        if get_launcher_rank() == 0:
            print(out)
        return
    if not cfg.overwrite:
        try:
            check_curve_files([{"varied": {"length": None}}], run.home)
        except ValueError as error:
            raise UsageError(f"{error}: move it, or give overwrite=true") from error
    measure_lengths(cfg, options, run, tried, out, new=new)


def parse_ema_lengths(text: str) -> list[float]:
    """0.05,0.1 or [0.05,0.1] as numbers, the shortest first; UsageError where they are none."""
    found = [parse_number(word) for word in str(text).strip("[] ").split(",")]
    if not all(map(EMA_LENGTH_RANGE.accepts, found)):
        raise UsageError(
            f"lengths={text}: each must be {EMA_LENGTH_RANGE}; they are written "
            "lengths=0.05,0.1,0.15"
        )
    return sorted(set(found))


def resolve_average_path(out: str | None, run: "SnapshotRun") -> Path:
    """Where the average goes; UsageError for a name that is a training checkpoint's."""
    path = resolve_path(out or os.path.relpath(run.path.with_name("phema.ckpt")))
    check_path_length("out", path, more=len("-000.json"))
    if path.suffix != ".ckpt" or path.name.startswith("step=") or path.stem in ("last", "best"):
        raise UsageError(
            f"out={path}: give a name of its own that ends in .ckpt; step=*, last and best are "
            "what train.py goes on from"
        )
    return path


@dataclass
class PostHocAverage:
    """An average that nobody kept: its weights by name, and how they came about."""

    state: dict
    facts: dict


@dataclass
class SnapshotRun:
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

    def average(self, length: float) -> PostHocAverage:
        """The average of this length at the last snapshot.

        Raises ValueError for a length out of range, CheckpointError where the snapshots are of
        another network than the checkpoint.
        """
        from tqdm import tqdm

        from ldm.training.power_ema import EMAProfile, solve_mixture
        from ldm.utils.checkpoint_file import CheckpointError, select_prefix
        from ldm.utils.ema_files import combine_snapshots

        kept = [EMAProfile(one.length, one.step) for one in self.snapshots]
        made = solve_mixture(kept, EMAProfile(length, self.step))
        if made.misfit > APPROXIMATE_MISFIT and get_launcher_rank() == 0:
            print(
                f"length={length:g} is approximate: the nearest sum of snapshots is off its "
                f"profile by {made.misfit:.0%}. More of them (a smaller phema.every) come nearer, "
                "and so does a kept length that is nearer to it (phema.lengths)"
            )
        how = {"disable": get_launcher_rank() != 0, "mininterval": get_progress_interval()}
        with tqdm(total=len(kept), desc="Averaging", **how) as bar:
            state = combine_snapshots(self.snapshots, made.shares, on_progress=bar.update)
        own = select_prefix(self.payload, "ema.module.")
        if {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in own.items()}:
            folder = self.snapshots[-1].path.parent
            raise CheckpointError(
                f"the snapshots in {folder} are of another network than {self.path}"
            )
        facts = {"length": length, "step": self.step}
        return PostHocAverage(state, {**facts, "snapshots": len(kept), "misfit": made.misfit})

    def save(self, average: PostHocAverage, out: Path, result: dict, *, new: bool) -> Path:
        """A checkpoint that is sampled and evaluated like any other, and that no run goes on from.

        new: one that replaces none, under a name with a number where `out` is there already.
        Raises OSError where it cannot be written.
        """
        from ldm.utils.checkpoint_file import write_checkpoint

        if get_launcher_rank() != 0:
            return out
        places = ("denoiser.", "ema.module.")
        both = {f"{place}{name}": t for place in places for name, t in average.state.items()}
        facts = {**self.payload["ldm"], "phema": {**average.facts, **result}}
        with reserve_files(lambda n: [out.with_stem(out.stem + n)], overwrite=not new) as [path]:
            write_checkpoint({"state_dict": both, "global_step": self.step, "ldm": facts}, path)
        return path


def load_snapshot_run(ckpt: str) -> SnapshotRun:
    """The run that `ckpt`, its directory or a checkpoint in it, stands for.

    Raises CheckpointError where there is no checkpoint, UsageError where there are no snapshots.
    """
    from ldm.utils.checkpoint_facts import read_checkpoint_metadata
    from ldm.utils.checkpoint_file import find_checkpoint, read_checkpoint, select_prefix
    from ldm.utils.ema_files import find_snapshots

    path = find_checkpoint(ckpt).resolve()
    payload = read_checkpoint(path)
    if "phema" in read_checkpoint_metadata(payload, path):
        raise UsageError(f"{path} is such an average already: give its run, ckpt=RUN")
    folder = path.parent.parent / "phema"
    keeps = select_prefix(payload, "phema.")  # else the folder is of another run by this name
    found = find_snapshots(folder, until=payload["global_step"]) if keeps else []
    if not found:
        raise UsageError(
            f"there are no snapshots of averages up to step {payload['global_step']} in {folder}: "
            "they are kept by a run that is begun with, say, phema.lengths='[0.05,0.10]'"
        )
    return SnapshotRun(path, payload, found)


def measure_lengths(
    cfg: DictConfig,
    options: dict[str, str | None],
    run: SnapshotRun,
    lengths: list[float],
    out: Path,
    *,
    new: bool,
) -> None:
    """Measure each length, draw the curve, store the best average.

    Raises UsageError for a metric that is not measured.
    """
    from ldm.config.evaluation import build_evaluation_source
    from ldm.utils.checkpoint_file import load_module_state

    cfg = OmegaConf.merge({"raw": False}, cfg)
    options = {**options, "ckpt": str(run.path), "images": None, "keep": None}
    source, first = (build_evaluation_source(cfg, options, kind="run"), get_launcher_rank() == 0)
    points, waiting, own, metric = [], [], {}, options["metric"]
    whole = [None, *lengths] if run.step == run.payload["global_step"] else lengths
    for length in whole:
        label = "as trained" if length is None else f"{length:g}"
        if first:
            print(f"length={label}", flush=True)
        measuring = source
        if length is not None:
            average = run.average(length)
            load_module_state(source.network, average.state, what=str(run.path))
            facts = {**average.facts, "digest": hash_module(source.network)}
            measuring = replace(
                source, facts=lambda cfg, facts=facts: describe_average(source.facts(cfg), facts)
            )
        found, pieces = measure_point(measuring, cfg, {"length": label}, options)
        waiting.append(pieces)
        metric = choose_metric(metric, found["metrics"])
        if length is None:
            own = found["metrics"]
        else:
            points.append({**found, "own": own})
    if not first:
        return
    best = find_best_point(points, metric)
    value = best["metrics"][metric]
    average = run.average(best["phema"]["length"])
    out = run.save(average, out, {"metric": metric, "value": value}, new=new)
    written = write_curve(points, run.home, metric=metric)
    print(f"{format_curve_table(points, metric=metric)}\n{format_verdict(points, best, metric)}")
    print("  ".join(map(str, [*written, out])))
    for pieces in waiting:
        shutil.rmtree(pieces, ignore_errors=True)


def describe_average(known: dict, facts: dict) -> dict:
    """What is known of a run's own weights, turned to an average's."""
    settings = {**known["settings"], "weights": "phema"}
    return {**known, "step": facts["step"], "settings": settings, "phema": facts}


def choose_metric(metric: str | None, metrics: dict[str, float]) -> str:
    """The metric to go by; UsageError where it is not measured."""
    if metric is None:
        there = [
            PREFERRED_METRICS[0],
            select_distance_metric(metrics),
            *PREFERRED_METRICS[1:],
            *metrics,
        ]
        return next(name for name in there if name in metrics)
    if (name := metric.removeprefix("val/")) not in metrics:
        near = suggest_nearest(name, metrics)
        raise UsageError(f"metric={metric} is not measured{near} There are: {', '.join(metrics)}")
    return name


def find_best_point(points: list[dict], metric: str) -> dict:
    """The point with the best value; of equal ones the shortest length."""
    sign = 1 if infer_metric_direction(metric) == "minimize" else -1
    return min(points, key=lambda point: sign * point["metrics"][metric])


def format_verdict(points: list[dict], best: dict, metric: str) -> str:
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
