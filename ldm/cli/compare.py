"""ldm compare RUN_OR_SWEEP_DIR ... [metric=val/loss out=DIR]; --help tells more."""

import argparse
import sys
from pathlib import Path

from ldm.config.command_line import LAYOUT_CHARACTERS, configure_output_encoding, pop_text_options
from ldm.experiments.ranking import find_runs
from ldm.experiments.report import compare_runs
from ldm.utils.errors import program_name
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


def main() -> None:
    """Parses the command line, ranks the runs and prints the table."""
    configure_output_encoding()
    texts = pop_text_options(["metric", "direction", "out", "overwrite"])
    parser = argparse.ArgumentParser(
        prog="python -m ldm.compare",
        usage="python -m ldm.compare RUN_OR_SWEEP_DIR ... [metric=KEY out=DIR]",
        description=COMPARE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", nargs="+", type=Path, help="a run, or a folder with runs")
    folders = parser.parse_args().directory
    out = Path(texts.pop("out", None) or (folders[0] if len(folders) == 1 else "compared"))
    texts["overwrite"] = texts.get("overwrite") == "true"
    try:
        check_path_length("out", out, more=len("/quality.png"))
        text = compare_runs(
            find_runs([resolve_path(folder) for folder in folders]), out=out, **texts
        )
        print(escape_control_characters(text, keep=LAYOUT_CHARACTERS))
    except (ValueError, OSError) as error:
        message = escape_control_characters(str(error), keep=LAYOUT_CHARACTERS)
        print(f"\n{program_name()}: {message}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
