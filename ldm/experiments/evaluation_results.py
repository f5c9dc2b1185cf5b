"""What an evaluation leaves, and what is there before it."""

import json
from collections.abc import Sequence
from pathlib import Path

from ldm.experiments.curves import check_curve_files
from ldm.experiments.former_names import update_names
from ldm.experiments.run_dir import list_config_changes
from ldm.utils.errors import UsageError

RESULT_KEYS = ("varied", "metrics", "intervals", "floor")  # what else is known says how
OUTPUT_HINT = "give another {}=.., or overwrite=true to replace what is there"


def check_result_location(varied: Sequence[dict[str, str]], out: Path) -> None:
    """UsageError where a file in `out` has the name of a result, and is none.

    varied: what sets each point apart. Former results are in nobody's way: the same settings give
    them again, and others are kept.
    """
    path = out / "metrics.json"
    try:
        if len(varied) > 1:
            check_curve_files([{"varied": each} for each in varied], out)
        elif path.exists() and "metrics" not in json.loads(path.read_text()):
            raise ValueError(f"{path} has no metrics")
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"out={out} holds what is none of ldm.evaluate's ({error}): {OUTPUT_HINT.format('out')}"
        ) from error


def check_image_folder(folder: Path, *, going_on: bool) -> None:
    """UsageError where pictures cannot be kept in a folder that holds files already.

    going_on: these are of the call that is taken up again.
    """
    is_empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not is_empty and not going_on:
        raise UsageError(f"keep={folder} is no empty folder: {OUTPUT_HINT.format('keep')}")


def rename_former_metrics(path: Path, facts: dict) -> str:
    """Give numbers that were not measured as these a name of their own; a line that says so."""
    from ldm.evaluation.tensor_cache import hash_facts

    try:
        former = update_names(json.loads(path.read_text()))
        own, other = (
            {name: value for name, value in one.items() if name not in RESULT_KEYS}
            for one in (json.loads(json.dumps(facts)), former)
        )
    except (OSError, ValueError, AttributeError):  # none, or none that can be read
        return ""
    if own == other:
        return ""
    place = path.with_name(f"{path.stem}-{hash_facts(other)}.json")
    path.replace(place)
    differing = [change for change in list_config_changes(other, own) if len(change) < 80]
    told = f" ({', '.join(differing[:3])})" if differing else ""
    return f"the former {path.name}{told} is kept as {place.name}\n"
