"""A ranking of runs as files: tables, metric curves and samples."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ldm.experiments import ranking
from ldm.experiments.curves import make_comparison_key, read_curves
from ldm.experiments.run_dir import infer_metric_direction
from ldm.utils.errors import suggest_nearest
from ldm.utils.files import write_text
from ldm.utils.text import escape_control_characters

FOREIGN_FILE_MESSAGE = "is none of ldm.compare's: move it, or give out=DIR or overwrite=true"
FIRST_LINES = {"ranking.md": r"# \d+ runs? by ", "ranking.csv": "rank,run,"}
MAX_REPORT_COLUMNS = 8  # of samples.png


def compare_runs(
    directories: Sequence[Path],
    *,
    out: Path,
    metric: str | None = None,
    direction: str | None = None,
    overwrite: bool = False,
) -> str:
    """Writes the ranking of these runs into `out`; returns the table and the names of the files.

    A run with damaged files is left out, and so are damaged samples; a line says why. overwrite:
    also files that are none of a report's.
    """
    if not overwrite:
        check_report_files(out)
    runs, notes = [], []
    for directory in directories:
        try:
            runs.append(ranking.read_run_record(directory))
        except (ValueError, OSError) as error:
            notes.append(f"{directory} is left out: {error}")
    if not runs:
        raise ValueError("; ".join(notes))
    metric = metric or ranking.select_ranking_metric(runs)
    logged = ranking.collect_logged_metrics(runs)
    if logged and metric not in logged:
        near = suggest_nearest(metric, logged)
        raise ValueError(f"metric={metric} was not logged by any of {len(runs)} runs{near}")
    if (direction := direction or infer_metric_direction(metric)) not in ("minimize", "maximize"):
        raise ValueError(f"direction={direction} is neither minimize nor maximize")
    runs = ranking.rank_runs(runs, metric, direction=direction)
    title = f"{len(runs)} run{'s' * (len(runs) > 1)} by {metric} ({direction})"
    table = ranking.format_markdown_table(*ranking.build_ranking_table(runs, metric))
    notes += ranking.list_ranking_caveats(runs, metric)
    errors = [
        f"```\n{run.directory}: {run.result['error']}\n```" for run in runs if "error" in run.result
    ]
    out.mkdir(parents=True, exist_ok=True)
    page = "\n\n".join([f"# {title}", table, *notes, *errors])
    write_text(out / "ranking.md", escape_control_characters(page, keep="\n\t") + "\n")
    columns, rows = ranking.build_ranking_table(runs, metric, constant=True)
    rows = [
        [*row, str(run.directory), run.result.get("error")]
        for row, run in zip(rows, runs, strict=True)
    ]
    write_text(
        out / "ranking.csv", ranking.format_csv_table([*columns, "directory", "error"], rows)
    )
    quality, quality_notes = _draw_quality_curves(runs, out)
    images, image_notes = _draw_curves_and_samples(runs, metric, direction, out)
    written = ["ranking.md", "ranking.csv", *images, *quality]
    lines = [f"{note}\n" for note in [*notes, *quality_notes, *image_notes]]
    files = "  ".join(str(out / name) for name in written)
    return "\n".join([f"\n{title}\n\n{table}\n", *lines, files])


def check_report_files(out: Path) -> None:
    """Raises ValueError if a file in `out` has the name of a report's and is none."""
    for name, pattern in FIRST_LINES.items():
        if (path := out / name).is_file():
            with path.open(encoding="utf-8", errors="replace") as file:
                if not re.match(pattern, file.readline(200)):
                    raise ValueError(f"{path} {FOREIGN_FILE_MESSAGE}")
    for path in [out / "curves.png", out / "samples.png", *out.glob("quality_*.png")]:
        if path.is_file() and not _is_report_image(path):
            raise ValueError(f"{path} {FOREIGN_FILE_MESSAGE}")


def _is_report_image(path: Path) -> bool:
    from ldm.utils.images import load_png

    try:
        return "runs" in load_png(path)[1]
    except ValueError:
        return False


def _draw_quality_curves(
    runs: Sequence[ranking.RunRecord], out: Path
) -> tuple[list[str], list[str]]:
    """Draws the curves of each name in one plot, of runs measured alike; returns files, notes."""
    from ldm.experiments.plots import plot_quality_curve, render_figure
    from ldm.utils.images import save_png

    files, notes, curves = [], [], {}
    for run, name in zip(runs, ranking.shorten_run_names(runs), strict=True):
        try:
            curves[name] = read_curves(run.directory)
        except ValueError as error:
            notes.append(str(error))
    for stem in sorted({stem for each in curves.values() for stem in each}):
        keys = {n: make_comparison_key(each[stem]) for n, each in curves.items() if stem in each}
        common, _ = Counter(keys.values()).most_common(1)[0]
        lines = {name: curves[name][stem] for name, key in keys.items() if key == common}
        note = f"{stem} of {', '.join(lines)}"
        if others := [name for name in keys if name not in lines]:
            note += f"; {', '.join(others)}: of other images, networks or settings"
        if len(lines) > 1:
            files.append(f"{stem.replace('curve', 'quality', 1)}.png")
            figure = render_figure(plot_quality_curve(lines))
            save_png(figure, out / files[-1], {"runs": list(lines)})
            notes.append(f"{files[-1]}: {note}")
        elif others:
            notes.append(f"not in one plot: {note}")
    return files, notes


def _draw_curves_and_samples(
    runs: Sequence[ranking.RunRecord], metric: str, direction: str, out: Path
) -> tuple[list[str], list[str]]:
    """Draws curves.png and samples.png if there is anything to draw; returns files and notes."""
    from ldm.experiments.plots import draw_sample_page, plot_metric_curves
    from ldm.utils.images import save_png

    files, notes, names = [], [], ranking.shorten_run_names(runs)
    panels = {
        key: [(n, run.curve(key)) for n, run in zip(names, runs, strict=True) if run.curve(key)]
        for key in dict.fromkeys([metric, *ranking.select_ranking_metrics(runs)])
    }
    if panels := {key: lines for key, lines in panels.items() if lines}:
        save_png(plot_metric_curves(panels), out / "curves.png", {"runs": names})
        files.append("curves.png")
    samples = []
    for run in runs:
        try:
            samples.append(_read_samples(run))
        except (ValueError, TypeError) as error:
            samples.append(((), []))
            notes.append(f"{run.directory} has no images to show: {error}")
    # The images of a column must show the same prompt: that of most runs; the others are left out.
    if prompts := Counter(texts for texts, _ in samples if texts):
        shared = prompts.most_common(1)[0][0][:MAX_REPORT_COLUMNS]
        rows = [
            (f"{i + 1}. {_format_run_title(run, metric)}: {name}", images)
            for i, (run, name, (texts, images)) in enumerate(zip(runs, names, samples, strict=True))
            if images and texts[:MAX_REPORT_COLUMNS] == shared
        ]
        others = len(runs) - len(rows)
        text = f"The same prompts and seeds for each run, best first by {metric} ({direction})."
        text += f" {others} runs have no such images." if others else ""
        text = " ".join([text, *ranking.list_ranking_caveats(runs, metric)])
        page = draw_sample_page("Samples of each run", text, shared, rows)
        save_png(page, out / "samples.png", {"runs": names})
        files.append("samples.png")
    return files, notes


def _format_run_title(run: ranking.RunRecord, metric: str) -> str:
    value = run.last_value(metric)
    return f"{'unknown' if value is None else f'{value:.4g}'}, {run.state} after {run.step} steps"


def _read_samples(run: ranking.RunRecord) -> tuple[tuple[str, ...], list]:
    """Returns what the newest sample file of a run shows, and its images; both may be empty."""
    from ldm.utils.images import load_png, split_image_grid

    if not (files := sorted((run.directory / "samples").glob("step=*.png"))):
        return (), []
    grid, facts = load_png(files[-1])
    texts = facts.get("prompts") or facts.get("keys") or []
    if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
        raise ValueError(f"{files[-1]} does not say what it shows")
    count, images = len(texts), []
    if facts.get("prompts"):
        images = split_image_grid(grid, count)
    elif texts:  # of an autoencoder: the originals, and below them their reconstructions
        images = split_image_grid(grid, 2 * count, columns=count)[count:]
    return tuple(texts), images[:MAX_REPORT_COLUMNS]
