"""Errors that a user can mend."""

import difflib
import sys
from collections.abc import Iterable
from pathlib import Path

CLI_DIR = Path(__file__).resolve().parents[1] / "cli"


class UsageError(ValueError):
    """A mistake that the user can mend: printed without a trace."""


def program_name() -> str:
    """Returns the program as the user typed it: train.py, python -m ldm.compare or ldm compare."""
    program = Path(sys.argv[0])
    if program.parent.resolve() != CLI_DIR:
        return program.name
    module = f"ldm.{program.stem}"
    return f"python -m {module}" if module in sys.orig_argv else f"ldm {program.stem}"


def format_program(verb: str) -> str:
    """Returns how `train` or `sample` is typed here: python train.py, or ldm train (of a wheel)."""
    script = CLI_DIR.parents[1] / f"{verb}.py"
    is_installed = program_name().startswith("ldm ") or not script.is_file()
    return f"ldm {verb}" if is_installed else f"python {verb}.py"


def suggest_nearest(key: str, known: Iterable[str]) -> str:
    """Returns ' - did you mean ...?' for a mistyped key, or nothing."""
    # The groups that contain the key, and targets, are not meant.
    known = [k for k in known if not f"{key}.".startswith(f"{k}.") and not k.endswith("._target_")]
    leaf = key.rpartition(".")[2]
    by_leaf = {k.rpartition(".")[2]: k for k in reversed(known)}
    if leaf in by_leaf:  # the right name in the wrong group
        close = [by_leaf[leaf]]
    elif not (close := difflib.get_close_matches(key, known, n=1, cutoff=0.6)):
        close = [by_leaf[m] for m in difflib.get_close_matches(leaf, list(by_leaf), n=1)]
    return f" - did you mean {close[0]}?" if close else ""


def format_unknown_checkpoint(ckpt: str, name: str) -> str:
    """Returns the message for a checkpoint that does not exist, with the nearest that do."""
    known = sorted(str(link.parent.parent) for link in Path("runs").glob("**/last.ckpt"))
    near = difflib.get_close_matches(ckpt, known, n=3, cutoff=0)
    hint = f"; the nearest here: {', '.join(near)}" if near else ""
    return f"{name}='{ckpt}' is neither a run directory nor a file{hint}"
