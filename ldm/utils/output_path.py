"""Resolves and checks `out=` before anything slow is imported or loaded."""

import re
import tempfile
from pathlib import Path

from ldm.utils.files import check_path_length, resolve_path

OUTPUT_SUFFIXES = {"images": (".png",), "videos": (".gif", ".webp", ".mp4")}


def resolve_output_file(out: str | None, default: Path, *, moving: bool | None) -> Path:
    """Returns the file to write: `out`, with a suffix if it has none, or `default` in a folder.

    moving: whether it is a video; None if not known yet.
    """
    kinds = {kind: s for kind, s in OUTPUT_SUFFIXES.items() if moving in (None, kind == "videos")}
    suffixes = [suffix for endings in kinds.values() for suffix in endings]
    default = default.with_suffix(suffixes[0])
    path = resolve_path(out) if out else default
    check_path_length("out", path, more=len("-000_previews.png"))
    if out and (out.endswith("/") or path.is_dir()):
        path = path / default.name
    ending = re.search(r"\.[a-z][a-z0-9]{1,4}$", path.name.lower())
    if ending is None:
        path = path.with_name(path.name + suffixes[0])
    elif ending[0] in suffixes:
        path = path.with_suffix(ending[0])
    else:
        ways = ", ".join(f"{kind} as {', '.join(endings)}" for kind, endings in kinds.items())
        raise ValueError(f"out={out}: {ways.replace(' as ', ' are written as ', 1)}")
    check_video_writer(path)
    return path


def prepare_output_file(out: str | None, default: Path, *, moving: bool) -> Path:
    """Creates the folder of `resolve_output_file`; ValueError if it is not writable."""
    path = resolve_output_file(out, default, moving=moving)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        file = next((each for each in path.parents if each.is_file()), None)
        why = error.strerror if file is None else f"{file} is a file, not a folder"
        raise ValueError(f"out={path}: nothing can be written there ({why})") from error
    return path


def check_video_writer(path: Path) -> None:
    """Raises ValueError for .mp4 if PyAV is not installed."""
    if path.suffix == ".mp4":
        try:
            import av  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"{path}: MP4 needs PyAV, pip install av; .gif and .webp need nothing"
            ) from error
