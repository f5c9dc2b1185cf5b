"""ldm compare RUN_OR_SWEEP_DIR ... [metric=val/loss out=DIR]; --help tells more."""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from ldm.config.command_line import (
    LAYOUT_CHARACTERS,
    configure_output_encoding,
    exit_with_usage_error,
    split_text_options,
)
from ldm.config.search_path import order_command_words
from ldm.experiments.ranking import find_runs
from ldm.experiments.report import compare_runs
from ldm.utils.errors import UsageError, suggest_nearest
from ldm.utils.files import check_path_length, resolve_path
from ldm.utils.text import escape_control_characters

COMPARE_HELP = """\
Ranks runs: a table of their differences and results, a plot of their validation curves, and one
of their samples for the same prompts and seeds.

  python -m ldm.compare runs/my-sweep              # all jobs of a sweep, while it lasts or later
  python -m ldm.compare runs/a runs/b runs/c       # any runs
  python -m ldm.compare runs/my-sweep metric=val/scene_accuracy out=compared

It reads metrics.csv, result.json and samples/; it generates no images. It writes ranking.md,
ranking.csv, curves.png and samples.png. Where two runs or more have curve_*.json of ldm.evaluate,
of the same settings and images, quality_*.png shows them in one plot.

  metric=KEY       what ranks; default: the metric of the runs
  direction=minimize|maximize      default: by the metric's name
  out=DIR          default: the directory where one is named, else `compared`
  overwrite=true   replaces files in it that have the names of these and are no earlier ranking"""


COMPARE_OPTIONS = ("metric", "direction", "out", "overwrite")


def main() -> None:
    """Reads the command line, ranks the runs and prints the table."""
    configure_output_encoding()
    if {"--help", "-h"} & set(sys.argv[1:]):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # its reader may leave early, as `head` does
        print(COMPARE_HELP)
        return
    try:
        texts, words = split_text_options(order_command_words(sys.argv[1:]), COMPARE_OPTIONS)
        folders = read_run_folders(words)
        out = Path(texts.pop("out", None) or (folders[0] if len(folders) == 1 else "compared"))
        check_path_length("out", out, more=len("/quality.png"))
        overwrite = texts.pop("overwrite", "false").lower()
        if overwrite not in ("true", "false"):
            raise UsageError(f"overwrite={overwrite} must be true or false")
        text = compare_runs(find_runs(folders), out=out, overwrite=overwrite == "true", **texts)
        print(escape_control_characters(text, keep=LAYOUT_CHARACTERS))
    except (ValueError, OSError) as error:
        exit_with_usage_error(UsageError(str(error)), "compare")


def read_run_folders(words: Sequence[str]) -> list[Path]:
    """Returns the folders on the command line; UsageError without one, or for another word."""
    for key, equals, _ in (word.partition("=") for word in words if not Path(word).exists()):
        if equals and "/" not in key:  # the job of a sweep is a folder such as a/scheduler=cosine
            near = suggest_nearest(key, COMPARE_OPTIONS)
            raise UsageError(f"there is no setting '{key}'{near or '; --help lists them'}")
    if not words:
        raise UsageError("a run, or a folder with runs, is needed: give runs/my-sweep")
    return [resolve_path(word) for word in words]


if __name__ == "__main__":
    main()
