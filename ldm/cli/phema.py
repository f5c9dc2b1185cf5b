"""ldm phema ckpt=runs/my-run [lengths=.. | length=0.13]: post-hoc EMA lengths; see --help."""

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ldm.config.command_line import TextOptions, command, require_option
from ldm.config.measurement import measure_point
from ldm.config.ranges import EMA_LENGTH_RANGE
from ldm.config.sample_options import LOCATION_SETTINGS, check_checkpoints_and_device
from ldm.experiments import curves
from ldm.experiments.run_dir import get_launcher_rank, infer_metric_direction, parse_number
from ldm.utils.errors import UsageError, suggest_nearest
from ldm.utils.files import check_path_length, reserve_files, resolve_path
from ldm.utils.hashing import hash_module
from ldm.utils.text import get_progress_interval

PHEMA_TEXT_OPTIONS = (
    *("ckpt", "lengths", "metric", "data", "others", "subset", "out"),
    *LOCATION_SETTINGS,
)
APPROXIMATE_MISFIT = 0.1  # an average with a larger misfit is called approximate
PREFERRED_METRICS = ("scene_accuracy", "clip_score")  # what decides where no metric is requested


def synthesize_ema(cfg: DictConfig, options: TextOptions) -> None:
    """Stores the average of `length`, or without one that of `lengths` which measures best."""
    lengths = parse_ema_lengths(options["lengths"])
    check_checkpoints_and_device(cfg, require_option(options, "ckpt"))
    run = load_snapshot_run(options["ckpt"])
    out = resolve_average_path(options["out"], run)
    new = options["out"] is not None and not cfg.overwrite
    if cfg.length is not None:
        out = run.save(*run.average(cfg.length), out, new=new)
        if get_launcher_rank() == 0:
            print(out)
        return
    if not cfg.overwrite:
        try:
            curves.check_curve_files([{"varied": {"length": None}}], run.home)
        except ValueError as error:
            raise UsageError(f"{error}: move it, or give overwrite=true") from error
    measure_lengths(cfg, options, run, lengths, out, new=new)


def parse_ema_lengths(text: str) -> list[float]:
    """Returns 0.05,0.1 or [0.05,0.1] as sorted numbers; UsageError where they are none."""
    lengths = [parse_number(word) for word in str(text).strip("[] ").split(",")]
    if not all(map(EMA_LENGTH_RANGE.accepts, lengths)):
        raise UsageError(
            f"lengths={text}: each must be {EMA_LENGTH_RANGE}; they are written "
            "lengths=0.05,0.1,0.15"
        )
    return sorted(set(lengths))


def resolve_average_path(out: str | None, run: "SnapshotRun") -> Path:
    """Returns the file for the average; UsageError for the name of a training checkpoint."""
    path = resolve_path(out or os.path.relpath(run.path.with_name("phema.ckpt")))
    check_path_length("out", path, more=len("-000.json"))
    if path.suffix != ".ckpt" or path.name.startswith("step=") or path.stem in ("last", "best"):
        raise UsageError(
            f"out={path}: give another name that ends in .ckpt; train.py resumes from step=*, last "
            "and best"
        )
    return path


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
        """The step of the last snapshot, for which averages are synthesized."""
        return self.snapshots[-1].step

    def average(self, length: float) -> tuple[dict, dict]:
        """Returns the weights of the average of this length, by name, and how it was made."""
        from tqdm import tqdm

        from ldm.training.power_ema import EMAProfile, solve_mixture
        from ldm.utils.checkpoint_file import CheckpointError, select_prefix
        from ldm.utils.ema_files import combine_snapshots

        profiles = [EMAProfile(one.length, one.step) for one in self.snapshots]
        mixture = solve_mixture(profiles, EMAProfile(length, self.step))
        first = get_launcher_rank() == 0
        if mixture.misfit > APPROXIMATE_MISFIT and first:
            print(
                f"length={length:g} is approximate: the nearest sum of snapshots is off its "
                f"profile by {mixture.misfit:.0%}. More snapshots (a smaller phema.every) come "
                "nearer, and so does a saved length that is nearer to it (phema.lengths)"
            )
        bar = {"disable": not first, "mininterval": get_progress_interval()}
        with tqdm(total=len(profiles), desc="Averaging", **bar) as progress:
            state = combine_snapshots(self.snapshots, mixture.shares, on_progress=progress.update)
        own = select_prefix(self.payload, "ema.module.")
        if {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in own.items()}:
            folder = self.snapshots[-1].path.parent
            raise CheckpointError(
                f"the snapshots in {folder} are of another network than {self.path}"
            )
        facts = {"length": length, "step": self.step}
        return state, {**facts, "snapshots": len(profiles), "misfit": mixture.misfit}

    def save(self, state: dict, facts: dict, out: Path, *, new: bool) -> Path:
        """Writes a checkpoint that no run resumes; `new`: under a name that no file has."""
        from ldm.utils.checkpoint_file import write_checkpoint

        if get_launcher_rank() != 0:
            return out
        prefixes = ("denoiser.", "ema.module.")
        state = {f"{prefix}{name}": t for prefix in prefixes for name, t in state.items()}
        facts = {**self.payload["ldm"], "phema": facts}
        with reserve_files(lambda n: [out.with_stem(out.stem + n)], overwrite=not new) as [path]:
            write_checkpoint({"state_dict": state, "global_step": self.step, "ldm": facts}, path)
        return path


def load_snapshot_run(ckpt: str) -> SnapshotRun:
    """Returns the run of `ckpt`, a directory or a checkpoint in it, with its snapshots."""
    from ldm.utils.checkpoint_facts import read_checkpoint_metadata
    from ldm.utils.checkpoint_file import find_checkpoint, read_checkpoint, select_prefix
    from ldm.utils.ema_files import find_snapshots

    path = find_checkpoint(ckpt).resolve()
    payload = read_checkpoint(path)
    if "phema" in read_checkpoint_metadata(payload, path):
        raise UsageError(f"{path} is such an average already: give its run, ckpt=RUN")
    folder = path.parent.parent / "phema"
    has_phema = select_prefix(payload, "phema.")  # else the folder is of another run by this name
    snapshots = find_snapshots(folder, until=payload["global_step"]) if has_phema else []
    if not snapshots:
        raise UsageError(
            f"there are no snapshots of averages up to step {payload['global_step']} in {folder}: "
            "a run saves them that starts with, say, phema.lengths='[0.05,0.10]'"
        )
    return SnapshotRun(path, payload, snapshots)


def measure_lengths(
    cfg: DictConfig,
    options: TextOptions,
    run: SnapshotRun,
    lengths: list[float],
    out: Path,
    *,
    new: bool,
) -> None:
    """Measures each length, draws the curve, stores the best average."""
    from ldm.config.evaluation import build_evaluation_source
    from ldm.utils.checkpoint_file import load_module_state
    from ldm.utils.lora_weights import merge_adapters

    cfg = OmegaConf.merge({"raw": False}, cfg)
    options = {**options, "ckpt": str(run.path), "images": None, "keep": None}
    source, first = build_evaluation_source(cfg, options, kind="run"), get_launcher_rank() == 0
    points, waiting, own, metric = [], [], {}, options["metric"]
    whole = [None, *lengths] if run.step == run.payload["global_step"] else lengths
    for length in whole:
        label = "as trained" if length is None else f"{length:g}"
        if first:
            print(f"length={label}", flush=True)
        measuring = source
        if length is not None:
            state, facts = run.average(length)
            weights = merge_adapters(state, run.payload["ldm"])
            load_module_state(source.network, weights, what=str(run.path))
            facts["digest"] = hash_module(source.network)
            measuring = replace(
                source, facts=lambda cfg, facts=facts: describe_average(source.facts(cfg), facts)
            )
        results, pieces = measure_point(measuring, cfg, {"length": label}, options)
        waiting.append(pieces)
        metric = choose_metric(metric, results["metrics"])
        if length is None:
            own = results["metrics"]
        else:
            points.append({**results, "own": own})
    if not first:
        return
    sign = 1 if infer_metric_direction(metric) == "minimize" else -1  # of equal ones the shortest
    best = min(points, key=lambda point: sign * point["metrics"][metric])
    state, facts = run.average(best["phema"]["length"])
    facts |= {"metric": metric, "value": best["metrics"][metric]}
    out = run.save(state, facts, out, new=new)
    written = curves.write_curve(points, run.home, metric=metric)
    print(curves.format_curve_table(points, metric=metric))
    print(format_verdict(points, best, metric))
    print("  ".join(map(str, [*written, out])))
    for pieces in waiting:
        shutil.rmtree(pieces, ignore_errors=True)


def describe_average(facts: dict, average: dict) -> dict:
    """Returns the facts of a run's own weights, changed to those of an average."""
    settings = {**facts["settings"], "weights": "phema"}
    return {**facts, "step": average["step"], "settings": settings, "phema": average}


def choose_metric(metric: str | None, metrics: dict[str, float]) -> str:
    """Returns the metric that decides; UsageError where it is not measured."""
    if metric is None:
        first, *others = PREFERRED_METRICS
        names = [first, curves.select_distance_metric(metrics), *others, *metrics]
        return next(name for name in names if name in metrics)
    if (name := metric.removeprefix("val/")) not in metrics:
        near = suggest_nearest(name, metrics)
        raise UsageError(f"metric={metric} is not measured{near} There are: {', '.join(metrics)}")
    return name


def format_verdict(points: list[dict], best: dict, metric: str) -> str:
    """Returns the best length in words, with a hint where all are equal or it is at an end."""
    text = f"best: length={best['varied']['length']}, {metric} {best['metrics'][metric]:.4g}"
    if own := best["own"]:
        text += f" (the average as trained: {own[metric]:.4g})"
    if len({point["metrics"][metric] for point in points}) == 1 < len(points):
        text += "; all are alike"
    elif len(points) > 1 and best in (points[0], points[-1]):
        text += "; it is the last of those tried, and others beyond it may be better"
    return text


main = command("phema", texts=PHEMA_TEXT_OPTIONS, resumable=True)(synthesize_ema)

if __name__ == "__main__":
    main()
