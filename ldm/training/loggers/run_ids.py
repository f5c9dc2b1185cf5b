"""The ids of a run directory's runs on servers, which a copy of the directory must not use."""

import json
import socket
from contextlib import suppress
from pathlib import Path

from ldm.experiments.run_dir import get_launcher_rank
from ldm.utils.files import write_text

RUN_ID_FILES = ("wandb_id", "wandb_url", "mlflow_id")
ORIGIN_FILE = "origin.json"  # where the directory was when it last used its ids


def write_run_id(path: Path, run_id: str) -> None:
    """Writes the id of a run directory's run, and where the directory is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, f"{run_id}\n")
    _write_origin(path.parent)


def forget_copied_ids(run_dir: Path) -> None:
    """Removes the ids from a run directory that is a copy of another one, and says so."""
    ids = [path for name in RUN_ID_FILES if (path := run_dir / name).is_file()]
    if not ids or get_launcher_rank() != 0:
        return
    origin: dict = {}
    with suppress(OSError, ValueError):
        origin = json.loads((run_dir / ORIGIN_FILE).read_text())
    if is_copy(run_dir, origin):
        print(
            f"{run_dir} is a copy of {origin['path']} on {origin['host']}, whose W&B or MLflow run "
            "is left alone: this directory gets a run of its own",
            flush=True,
        )
        for path in ids:
            path.unlink()
    if origin != describe_place(run_dir):
        _write_origin(run_dir)


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
