"""The ids of a run directory's runs on servers, which a copy of the directory must not use."""

import json
import re
import socket
from contextlib import suppress
from pathlib import Path

from ldm.experiments.run_dir import get_launcher_rank
from ldm.utils.files import read_json, read_text, write_text
from ldm.utils.text import escape_control_characters

RUN_ID_FILES = ("wandb_id", "wandb_url", "mlflow_id")
ORIGIN_FILE = "origin.json"  # where the directory was when it last used its ids
MAX_ID_FILE_BYTES = 2**16


def write_run_id(path: Path, run_id: str) -> None:
    """Writes the id of a run directory's run, and where the directory is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, f"{run_id}\n")
    _write_origin(path.parent)


def read_run_id(path: Path) -> str:
    """Returns the id in a file of RUN_ID_FILES; ValueError for what is no id.

    The directory may come from anyone, and commands that are printed hold the id.
    """
    run_id = read_text(path, max_bytes=MAX_ID_FILE_BYTES).strip()
    if not re.fullmatch(r"\w[\w.-]{0,127}", run_id, re.ASCII):
        raise ValueError(
            f"{path} holds no id of a run: delete it, and this directory gets a run of its own"
        )
    return run_id


def forget_copied_ids(run_dir: Path) -> None:
    """Removes the ids from a run directory that is a copy of another one, and says so."""
    ids = [path for name in RUN_ID_FILES if (path := run_dir / name).is_file()]
    if not ids or get_launcher_rank() != 0:
        return
    origin = read_origin(run_dir)
    if is_copy(run_dir, origin):
        where = escape_control_characters(f"{origin['path']} on {origin['host']}")
        print(
            f"{run_dir} is a copy of {where}, whose W&B or MLflow run is left alone: this "
            "directory gets a run of its own",
            flush=True,
        )
        for path in ids:
            path.unlink()
    if origin != describe_place(run_dir):
        _write_origin(run_dir)


def read_origin(run_dir: Path) -> dict:
    """Returns what `describe_place` said when the ids were last used; {} where nothing says so."""
    with suppress(OSError, ValueError):
        origin = read_json(run_dir / ORIGIN_FILE, max_bytes=MAX_ID_FILE_BYTES)
        if isinstance(origin, dict) and all(
            isinstance(origin.get(key), type(value))
            for key, value in describe_place(run_dir).items()
        ):
            return origin
    return {}


def is_copy(run_dir: Path, origin: dict) -> bool:
    """Returns whether a directory is a copy: its path and inode are not those of `origin`.

    On the same machine it is none if the original is gone: it was moved to another file system.
    A machine is not compared: a run may continue on another one, in the same path.
    """
    here = describe_place(run_dir)
    if not origin or origin["path"] == here["path"] or origin["inode"] == here["inode"]:
        return False
    return origin["host"] != here["host"] or Path(origin["path"]).exists()


def describe_place(run_dir: Path) -> dict:
    """Returns path, inode and machine of a directory."""
    path = run_dir.resolve()
    return {"path": str(path), "inode": path.stat().st_ino, "host": socket.gethostname()}


def _write_origin(run_dir: Path) -> None:
    with suppress(OSError):  # a full disk
        write_text(run_dir / ORIGIN_FILE, json.dumps(describe_place(run_dir)) + "\n")
