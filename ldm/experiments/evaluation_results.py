"""The files of an evaluation: what may be overwritten, and what gets another name."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from ldm.experiments.curves import check_curve_files
from ldm.experiments.former_names import update_names
from ldm.experiments.run_dir import list_config_changes
from ldm.utils.errors import UsageError
from ldm.utils.files import reserve_files, write_text

RESULT_KEYS = ("varied", "metrics", "intervals", "floor")  # the other keys say how it was measured
OUTPUT_HINT = "give another {}=.., or overwrite=true to replace what is there"


def check_result_location(varied: Sequence[dict[str, str]], out: Path) -> None:
    """Raises UsageError if a file in `out` has the name of a result and is none.

    varied: the settings of each point.
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
    """Raises UsageError if the folder for images is not empty, unless this call resumes one."""
    is_empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not is_empty and not going_on:
        raise UsageError(f"keep={folder} is no empty folder: {OUTPUT_HINT.format('keep')}")


def rename_former_metrics(path: Path, facts: dict) -> str:
    """Renames metrics that were measured in another way; returns a line that says so, or ""."""
    from ldm.evaluation.tensor_cache import hash_facts

    def without_results(table: dict) -> dict:
        return {name: value for name, value in table.items() if name not in RESULT_KEYS}

    try:
        former = without_results(update_names(json.loads(path.read_text())))
    except (OSError, ValueError, AttributeError):  # no file, or no metrics
        return ""
    if former == (own := without_results(json.loads(json.dumps(facts)))):
        return ""
    renamed = path.replace(path.with_name(f"{path.stem}-{hash_facts(former)}.json"))
    changes = [change for change in list_config_changes(former, own) if len(change) < 80]
    why = f" ({', '.join(changes[:3])})" if changes else ""
    return f"the former {path.name}{why} is kept as {renamed.name}\n"


def write_evaluation(facts: dict, out: Path, *, overwrite: bool) -> tuple[Path, str]:
    """Writes the results of one point to `out`, a .json file or a folder; returns the file, a note.

    An existing file gets a number; in a folder, former results of other settings are renamed.
    """
    note, path = "", out / "metrics.json"
    writing = nullcontext([path])
    if out.suffix == ".json":
        writing = reserve_files(lambda n: [out.with_stem(out.stem + n)], overwrite=overwrite)
    else:
        note = rename_former_metrics(path, facts)
    with writing as [path]:
        write_text(path, json.dumps(facts, indent=2) + "\n")
    return path, note


def save_point_images(folder: Path, subset, items: range, images) -> None:
    """Saves each image as a PNG, named by its number in the subset, with its caption in a .txt."""
    from PIL import Image

    from ldm.utils.images import save_png

    for i, image in zip(items, images.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
        facts = {"prompt": subset.captions[i], "seed": subset.seeds[i], "key": subset.keys[i]}
        path = folder / f"{i:07d}.png"
        save_png(Image.fromarray(image), path, facts)
        write_text(path.with_suffix(".txt"), subset.captions[i] + "\n")
