"""python -m ldm.compare RUN_OR_SWEEP_DIR ... [metric=val/loss out=DIR]; --help tells more."""

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
Ranks runs: a table of what differs between them and what came of them, a picture of their
validation curves, and one of what they paint for the same prompts and seeds.

  python -m ldm.compare runs/my-sweep              # all jobs of a sweep, while it lasts or later
  python -m ldm.compare runs/a runs/b runs/c       # any runs
  python -m ldm.compare runs/my-sweep metric=val/scene_accuracy out=compared

It reads metrics.csv, result.json and samples/; nothing is painted anew. It writes ranking.md,
ranking.csv, curves.png and samples.png. Where ldm.evaluate has left curve_*.json in two runs or
more, of the same settings and pictures, quality_*.png shows them in one picture.

  metric=KEY       what ranks; default: what the runs themselves went by
  direction=minimize|maximize      default: by the metric's name
  out=DIR          default: the directory where one is named, else `compared`
  overwrite=true   replaces files in it that have the names of these and are no earlier ranking"""


def main() -> None:
    """Parse, compare, print."""
    configure_output_encoding()
    texts = pop_text_options(["metric", "direction", "out", "overwrite"])
    parser = argparse.ArgumentParser(
        prog="python -m ldm.compare",
        usage="python -m ldm.compare RUN_OR_SWEEP_DIR ... [metric=KEY out=DIR]",
        description=COMPARE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", nargs="+", type=Path, help="a run, or a folder with runs")
    places = parser.parse_args().directory
    out = Path(texts.pop("out", None) or (places[0] if len(places) == 1 else "compared"))
    places = [resolve_path(place) for place in places]
    texts["overwrite"] = texts.get("overwrite") == "true"
    try:
        check_path_length("out", out, more=len("/quality.png"))
        print(
            escape_control_characters(
                compare_runs(find_runs(places), out=out, **texts), keep=LAYOUT_CHARACTERS
            )
        )
    except (ValueError, OSError) as error:
        said = escape_control_characters(str(error), keep=LAYOUT_CHARACTERS)
        print(f"\n{program_name()}: {said}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
