"""Checkpoint files: written so that a kill loses nothing, read without running anyone's code.

A checkpoint is `<name>.ckpt`, tensors and plain values that `torch.load(weights_only=True)` opens,
and `<name>.ckpt.json`, its manifest with size and digest. It is written to a temporary name in the
same directory, flushed to the disk and renamed; the manifest comes last. A checkpoint without a
valid manifest does not exist. `last.ckpt` is a link to the newest.
"""

import difflib
import hashlib
import json
import os
import warnings
from pathlib import Path

import torch
from torch import nn

from ldm.files import TEMPORARY, replacing, write_text


class CheckpointError(ValueError):
    """A checkpoint that is missing, torn, changed, or does not fit."""


def write(payload: dict, path: Path) -> None:
    """Store `payload` at `path`, with its manifest; both replace what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A file that is about to be replaced has no valid manifest until its own is there.
    manifest_path(path).unlink(missing_ok=True)
    with replacing(path) as file:
        torch.save(payload, file)
    manifest = {"size": path.stat().st_size, "sha256": file_digest(path)}
    write_text(manifest_path(path), json.dumps(manifest) + "\n")


def link_last(path: Path) -> None:
    """Point `last.ckpt` beside `path` to it."""
    temporary = path.with_name(f".last.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(path.name)
    os.replace(temporary, path.with_name("last.ckpt"))


def read(path: Path) -> dict:
    """The payload of a checkpoint; its tensors stay on disk until they are used.

    Raises CheckpointError where the file is not what its manifest says, or holds anything but data.
    """
    path = path.resolve()
    if problem := flaw(path):
        raise CheckpointError(f"{path} cannot be used: {problem}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} is no checkpoint of ours, or holds code in place of data: it was not opened "
            f"({type(error).__name__}). Take the file that train.py wrote"
        ) from error


def flaw(path: Path) -> str | None:
    """Why the checkpoint cannot be trusted; None where it can."""
    if not path.is_file():
        return "there is no such file"
    if not manifest_path(path).is_file():
        return f"its manifest {manifest_path(path).name} is missing (a save that did not finish?)"
    try:
        manifest = json.loads(manifest_path(path).read_text())
        size, digest = manifest["size"], manifest["sha256"]
    except (ValueError, KeyError, TypeError):
        return f"its manifest {manifest_path(path).name} is damaged"
    if path.stat().st_size != size:
        return f"it has {path.stat().st_size} bytes where its manifest says {size}"
    if file_digest(path) != digest:
        return "its content does not have the digest of its manifest"
    return None


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a folder; None where there is no checkpoint at all.

    Those that are damaged are passed over with a warning. Raises CheckpointError where all are: to
    begin anew in silence would lose the run.
    """
    found = sorted(folder.glob("step=*.ckpt"), reverse=True)
    for path in found:
        problem = flaw(path)
        if problem is None:
            return path
        warnings.warn(f"checkpoint {path} is passed over: {problem}", stacklevel=2)
    if found:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints in {folder} is whole; move the folder away to "
            "begin anew"
        )
    return None


def keep_newest(folder: Path, count: int) -> None:
    """Delete all checkpoints of a folder but the `count` newest that have a manifest.

    What a killed save has left under a temporary name goes, too.
    """
    for left in folder.glob(f"*{TEMPORARY}"):
        left.unlink(missing_ok=True)
    kept = sorted(path for path in folder.glob("step=*.ckpt") if manifest_path(path).is_file())
    for path in folder.glob("step=*.ckpt"):
        if path not in kept[-count:]:
            remove(path)


def find(ckpt: str) -> Path:
    """The file that `ckpt`, a file or a run directory (its newest checkpoint), stands for.

    Raises CheckpointError where there is none.
    """
    path = Path(ckpt)
    if path.is_dir():
        last = newest(path / "checkpoints")
        if last is None:
            raise CheckpointError(
                f"'{ckpt}' has no checkpoint (yet) in {path / 'checkpoints'}. A run directory is "
                "what train.py made, such as runs/my-run"
            )
        return last
    if not path.is_file():
        known = sorted(str(found.parent.parent) for found in Path("runs").glob("**/last.ckpt"))
        near = difflib.get_close_matches(ckpt, known, n=3, cutoff=0)
        hint = f"; the nearest here: {', '.join(near)}" if near else ""
        raise CheckpointError(f"ckpt='{ckpt}' is neither a run directory nor a file{hint}")
    return path


def manifest_path(path: Path) -> Path:
    """Where the manifest of a checkpoint lies."""
    return path.with_name(path.name + ".json")


def remove(path: Path) -> None:
    """Delete a checkpoint, manifest first."""
    manifest_path(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(module: nn.Module) -> str:
    """SHA-256 of a module's names, types, shapes and values: which frozen part it was."""
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def load_into(module: nn.Module, state: dict, *, what: str) -> None:
    """Load a state dict; CheckpointError names the first differences with both shapes."""
    own = module.state_dict()
    wrong = [f"{name} is missing" for name in own if name not in state]
    wrong += [f"{name} is unknown" for name in state if name not in own]
    wrong += [
        f"{name} is {tuple(state[name].shape)} in the file and {tuple(own[name].shape)} here"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"{what} does not fit: {'; '.join(wrong[:3])}{more}")
    module.load_state_dict(state)


def part(payload: dict, prefix: str) -> dict:
    """The tensors of a checkpoint whose names begin with `prefix`, without it."""
    state = payload["state_dict"]
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
