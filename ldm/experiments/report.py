"""A ranking of runs as files: a table, their curves and their samples in one picture each."""

import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ldm.experiments.curves import make_comparison_key, read_curves
from ldm.experiments.ranking import (
    RunRecord,
    build_ranking_table,
    collect_logged_metrics,
    format_csv_table,
    format_markdown_table,
    list_ranking_caveats,
    rank_runs,
    read_run_record,
    select_ranking_metrics,
    shorten_run_names,
)
from ldm.experiments.run_dir import infer_metric_direction
from ldm.utils.errors import suggest_nearest
from ldm.utils.files import write_text
from ldm.utils.text import escape_control_characters

FOREIGN_FILE_MESSAGE = "is none of ldm.compare's: move it, or give out=DIR or overwrite=true"
LINES = "\n\t"


def compare_runs(
    directories: Sequence[Path],
    *,
    out: Path,
    metric: str | None = None,
    direction: str | None = None,
    overwrite: bool = False,
) -> str:
    """Write the ranking of these runs into `out`; the table, and where the rest lies.

    A run whose files are damaged is left out, and so is a picture; a line says why.
    Raises ValueError where runs have logged something, but not the metric, where none can be read,
    and where a file in `out` has the name of a result and is none, unless `overwrite`.
    """
    if not overwrite:
        check_report_files(out)
    compared, damaged = [], []
    for directory in directories:
        try:
            compared.append(read_run_record(directory))
        except (ValueError, OSError) as error:
            damaged.append(f"{directory} is left out: {error}")
    if not compared:
        raise ValueError("; ".join(damaged))
    asked = Counter(
        run.config["metric"] for run in compared if isinstance(run.config.get("metric"), str)
    )
    metric = metric or (asked.most_common(1)[0][0] if asked else "val/loss")
    logged = collect_logged_metrics(compared)
    if logged and metric not in logged:
        near = suggest_nearest(metric, logged)
        raise ValueError(f"metric={metric} was not logged by any of {len(compared)} runs{near}")
    if (direction := direction or infer_metric_direction(metric)) not in ("minimize", "maximize"):
        raise ValueError(f"direction={direction} is neither minimize nor maximize")
    order = rank_runs(compared, metric, direction=direction)
    table = format_markdown_table(*build_ranking_table(order, metric))
    columns, rows = build_ranking_table(order, metric, constant=True)
    failed = [f"{run.directory}: {run.result['error']}" for run in order if "error" in run.result]
    out.mkdir(parents=True, exist_ok=True)
    title = f"# {len(order)} run{'s' * (len(order) > 1)} by {metric} ({direction})"
    notes = [*damaged, *list_ranking_caveats(order, metric)]
    blocks = [title, table, *notes, *(f"```\n{words}\n```" for words in failed)]
    write_text(
        out / "ranking.md", escape_control_characters("\n\n".join(blocks), keep=LINES) + "\n"
    )
    more = [[str(run.directory), run.result.get("error")] for run in order]
    in_full = [[*row, *rest] for row, rest in zip(rows, more, strict=True)]
    text = format_csv_table([*columns, "directory", "error"], in_full)
    write_text(out / "ranking.csv", text)
    overlaid, said = _overlay_curves(order, out)
    drawn, unread = _draw_images(order, metric, direction, out)
    written = ["ranking.md", "ranking.csv", *drawn, *overlaid]
    lines = [f"\n{title[2:]}\n\n{table}\n", *(f"{note}\n" for note in [*notes, *said, *unread])]
    return "\n".join([*lines, "  ".join(str(out / name) for name in written)])


def check_report_files(out: Path) -> None:
    """ValueError where a file in `out` has the name of a result, and is none of an earlier call."""
    begins = {"ranking.md": r"# \d+ runs? by ", "ranking.csv": "rank,run,"}
    for name, words in begins.items():
        if (path := out / name).is_file():
            with path.open(encoding="utf-8", errors="replace") as file:
                if not re.match(words, file.readline(200)):
                    raise ValueError(f"{path} {FOREIGN_FILE_MESSAGE}")
    for path in [out / "curves.png", out / "samples.png", *out.glob("quality_*.png")]:
        if path.is_file() and "runs" not in _read_png_facts(path):
            raise ValueError(f"{path} {FOREIGN_FILE_MESSAGE}")


def _read_png_facts(path: Path) -> dict:
    """What a picture says of itself; nothing where it is no PNG."""
    from ldm.utils.images import load_png

    with suppress(ValueError):
        return load_png(path)[1]
    return {}


def _overlay_curves(order: Sequence[RunRecord], out: Path) -> tuple[list[str], list[str]]:
    """Draw the curves that ldm.evaluate has left, those of a name in one picture; files, and words.

    Of runs that were measured in different ways, the largest number that agree are drawn.
    """
    from ldm.experiments.plots import render_quality_curve
    from ldm.utils.images import save_png

    names, files, said = shorten_run_names(order), [], []
    found = []
    for run in order:
        try:
            found.append(read_curves(run.directory))
        except ValueError as error:
            found.append({})
            said.append(str(error))
    for stem in sorted({stem for one in found for stem in one}):
        having = {n: one[stem] for n, one in zip(names, found, strict=True) if stem in one}
        most, _ = Counter(map(make_comparison_key, having.values())).most_common(1)[0]
        lines = {n: points for n, points in having.items() if make_comparison_key(points) == most}
        told = f"{stem} of {', '.join(lines)}"
        if others := [name for name in having if name not in lines]:
            told += f"; {', '.join(others)}: of other pictures, networks or settings"
        if len(lines) > 1:
            files.append(f"{stem.replace('curve', 'quality', 1)}.png")
            save_png(render_quality_curve(lines), out / files[-1], {"runs": list(lines)})
            said.append(f"{files[-1]}: {told}")
        elif others:
            said.append(f"not in one picture: {told}")
    return files, said


def _draw_images(
    order: Sequence[RunRecord], metric: str, direction: str, out: Path
) -> tuple[list[str], list[str]]:
    """Draw what there is to draw; the names of the files, and what could not be read."""
    from ldm.experiments.plots import draw_sample_page, plot_metric_curves
    from ldm.utils.images import save_png

    written, names, unread = [], shorten_run_names(order), []
    drawn = {
        key: [(n, run.curve(key)) for n, run in zip(names, order, strict=True) if run.curve(key)]
        for key in dict.fromkeys([metric, *select_ranking_metrics(order)])
    }
    drawn = {key: lines for key, lines in drawn.items() if lines}
    if drawn:
        save_png(plot_metric_curves(drawn), out / "curves.png", {"runs": names})
        written.append("curves.png")
    painted = []
    for run in order:
        try:
            painted.append(_read_samples(run))
        except (ValueError, TypeError) as error:
            painted.append(((), []))
            unread.append(f"{run.directory} has no pictures to show: {error}")
    # The pictures of a column must show the same: most runs say what, the others are left out.
    heads = Counter(heads for heads, _ in painted if heads)
    if heads:
        shared = heads.most_common(1)[0][0][:8]
        rows = [
            (f"{i + 1}. {_format_run_title(run, metric)}: {name}", pictures)
            for i, (run, name) in enumerate(zip(order, names, strict=True))
            if (pictures := painted[i][1]) and painted[i][0][:8] == shared
        ]
        others = len(order) - len(rows)
        told = f"The same prompts and seeds for each run, best first by {metric} ({direction})."
        told += f" {others} runs have no such pictures." if others else ""
        page = draw_sample_page("Samples of each run", told, shared, rows)
        save_png(page, out / "samples.png", {"runs": names})
        written.append("samples.png")
    return written, unread


def _format_run_title(run: RunRecord, metric: str) -> str:
    value = run.last_value(metric)
    return f"{'unknown' if value is None else f'{value:.4g}'}, {run.state} after {run.step} steps"


def _read_samples(run: RunRecord) -> tuple[tuple[str, ...], list]:
    """What the newest sample picture of a run shows, and its single pictures; both may be none."""
    from ldm.utils.images import load_png, split_image_grid

    if not (files := sorted((run.directory / "samples").glob("step=*.png"))):
        return (), []
    picture, facts = load_png(files[-1])
    texts = facts.get("prompts") or facts.get("keys") or []
    if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
        raise ValueError(f"{files[-1]} does not say what it shows")
    if prompts := facts.get("prompts"):
        return tuple(prompts), split_image_grid(picture, len(prompts))[:8]
    if keys := facts.get("keys"):  # an autoencoder's: originals, and below them what it made
        return tuple(keys), split_image_grid(picture, 2 * len(keys), columns=len(keys))[
            len(keys) :
        ][:8]
    return (), []
