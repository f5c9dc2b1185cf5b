"""Checkpoint files: written so that a kill loses nothing, read without running anyone's code.

A checkpoint is `<name>.ckpt`, tensors and plain values that `torch.load(weights_only=True)` opens,
and `<name>.ckpt.json`, its manifest with size and digest. It is written to a temporary name in the
same directory, flushed to the disk and renamed; the manifest comes last. A checkpoint without a
valid manifest does not exist. `last.ckpt` is a link to the newest, `best.ckpt` to the one that
validated best.
"""

import difflib
import hashlib
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Collection
from errno import ENOSPC
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from ldm.utils.files import (
    TEMPORARY_SUFFIX,
    delete_temporary_files,
    read_regular_file,
    replace_file,
    resolve_path,
    write_text,
)
from ldm.utils.hashing import hash_file


class CheckpointError(ValueError):
    """A checkpoint that is missing, torn, changed, or does not fit."""


class _HashingWriter:
    """A file to write to that knows the digest of what it was given, and the error it met."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self.sha256.update(data)
            return self.file.write(data)
        except OSError as error:  # torch.save has a RuntimeError of its own take its place
            self.error = error
            raise

    def flush(self) -> None:
        """Left to `replacing`."""


def write_checkpoint(payload: dict, path: Path) -> None:
    """Store `payload` at `path`, with its manifest; both replace what was there.

    The file counts from the moment that it was read back and found to be what was written.
    Raises OSError where that fails; then nothing is left at `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A file that is about to be replaced has no valid manifest until its own is there.
    manifest_path(path).unlink(missing_ok=True)
    if (free := shutil.disk_usage(path.parent).free) < count_tensor_bytes(payload):
        raise OSError(ENOSPC, f"{os.strerror(ENOSPC)} ({free} bytes are free)")
    try:
        with replace_file(path) as file:
            hashed = _HashingWriter(file)
            try:
                torch.save(payload, hashed)
            except RuntimeError as error:
                raise hashed.error or error from None
        manifest = {"size": path.stat().st_size, "sha256": hashed.sha256.hexdigest()}
        if finite := payload.get("ldm", {}).get("finite"):
            manifest["finite"] = finite
        if hash_file(path) != manifest["sha256"]:
            raise OSError(f"{path} is not what was written when it is read back")
        write_text(manifest_path(path), json.dumps(manifest) + "\n")
    except OSError:
        delete_checkpoint(path)
        raise


def count_tensor_bytes(payload: object) -> int:
    """Bytes of all tensors in dicts and lists within one another."""
    if isinstance(payload, Tensor):
        return payload.nbytes
    parts = payload.values() if isinstance(payload, dict) else payload
    return sum(map(count_tensor_bytes, parts)) if isinstance(payload, dict | list | tuple) else 0


def export_weights(payload: dict, path: Path) -> None:
    """The weights of a checkpoint alone, averaged where there is an average, as safetensors.

    Beside it, under `.json`, what the checkpoint says of itself: step, stage, configuration.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = select_prefix(payload, "ema.module.") or payload["state_dict"]
    facts = {"step": payload["global_step"], **payload["ldm"]}
    write_text(path.with_suffix(".json"), json.dumps(facts, indent=2) + "\n")
    with replace_file(path) as file:
        file.write(to_safetensors({name: t.contiguous() for name, t in weights.items()}))


def link_last_checkpoint(path: Path) -> None:
    """Point `last.ckpt` beside `path` to it."""
    link_checkpoint(path, "last.ckpt")


def link_checkpoint(path: Path, name: str) -> None:
    """Point the link `name` beside `path` to it."""
    temporary = path.with_name(f".{name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    temporary.symlink_to(path.name)
    os.replace(temporary, path.with_name(name))


def read_checkpoint(path: Path) -> dict:
    """The payload of a checkpoint; its tensors stay on disk until they are used.

    Raises CheckpointError where the file is not what its manifest says, or holds anything but data.
    """
    path = path.resolve()
    if problem := find_checkpoint_flaw(path):
        good = find_last_good_checkpoint(path.parent, other_than=path)
        more = f". The last good one beside it is {good.name}" if good else ""
        raise CheckpointError(f"{path} cannot be used: {problem}{more}")
    return read_unverified_checkpoint(path)


def read_unverified_checkpoint(path: Path) -> dict:
    """`read` for a file whose digest was looked at already; raises CheckpointError likewise."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} is no checkpoint of ours, or holds code in place of data: it was not opened "
            f"({type(error).__name__}). Take the file that train.py wrote"
        ) from error


def find_checkpoint_flaw(path: Path) -> str | None:
    """Why the checkpoint cannot be trusted; None where it can."""
    if not path.is_file():
        return "there is no such file"
    if not manifest_path(path).is_file():
        return f"its manifest {manifest_path(path).name} is missing (a save that did not finish?)"
    try:
        manifest = json.loads(read_regular_file(manifest_path(path), max_bytes=2**16))
        size, digest = manifest["size"], manifest["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"its manifest {manifest_path(path).name} is damaged"
    try:
        if path.stat().st_size != size:
            return f"it has {path.stat().st_size} bytes where its manifest says {size}"
        if hash_file(path) != digest:
            return "its content does not have the digest of its manifest"
        if not manifest.get("finite") and has_nonfinite_weights(path):
            return "its weights are not finite: the training had failed"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return None


def find_newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a folder; None where there is no checkpoint at all.

    Those that are damaged are passed over with a warning that says what is lost with them. Raises
    CheckpointError where all are: to begin anew in silence would lose the run.
    """
    found = sorted(folder.glob("step=*.ckpt"), reverse=True)
    flaws: dict[Path, str] = {}
    for path in found:
        if problem := find_checkpoint_flaw(path):
            flaws[path] = problem
            continue
        for damaged, problem in flaws.items():
            lost = (
                f"what was trained from step {parse_checkpoint_step(path)} to "
                f"{parse_checkpoint_step(damaged)} is lost"
            )
            if parse_checkpoint_step(path) == parse_checkpoint_step(damaged):
                lost = "no step is lost"
            warnings.warn(
                f"checkpoint {damaged} is passed over: {problem}. {path.name} is taken in its "
                f"place: {lost}",
                stacklevel=2,
            )
        return path
    if found:
        told = "".join(f"\n  {path.name}: {problem}" for path, problem in flaws.items())
        raise CheckpointError(
            f"none of the {len(found)} checkpoints in {folder} is whole; move the folder away to "
            f"begin anew{told}"
        )
    return None


def find_last_good_checkpoint(
    folder: Path, *, before: int | None = None, other_than: Path | None = None
) -> Path | None:
    """The newest checkpoint of a folder that can be used, of those from before a step."""
    for path in sorted(folder.glob("step=*.ckpt"), reverse=True):
        early = before is None or parse_checkpoint_step(path) < before
        if early and path != other_than and is_valid_checkpoint(path):
            return path.resolve()
    return None


def has_nonfinite_weights(path: Path) -> bool:
    """Whether a file from before manifests told of it holds weights that are not finite."""
    try:
        found = dict(read_unverified_checkpoint(path)["state_dict"]).values()
        # A view may claim to be larger than its file.
        plain = [weight for weight in found if weight.nbytes <= weight.untyped_storage().nbytes()]
        return not all(weight.isfinite().all() for weight in plain)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError):
        return False  # no weights of ours, which is told where they are read


def is_valid_checkpoint(path: Path) -> bool:
    """Whether a checkpoint can be trusted."""
    return find_checkpoint_flaw(path) is None


def parse_checkpoint_step(path: Path) -> int:
    """The optimizer step in the name of a checkpoint, step=00000250_end.ckpt; 0 without one."""
    digits = path.name.removeprefix("step=")[:8]
    return int(digits) if digits.isdecimal() else 0


def prune_checkpoints(
    folder: Path, count: int, *, spare: Collection[str] = (), doubtful_from: int | None = None
) -> None:
    """Delete all checkpoints of a folder but the `count` newest that have a manifest.

    Those named in `spare` stay as well. Those of the step `doubtful_from` and later do not count,
    and the newest of them stays. What a killed save has left under a temporary name goes, too.
    """
    delete_temporary_files(folder)
    files = [path for path in folder.glob("step=*.ckpt") if not path.is_dir()]
    whole = sorted(path for path in files if manifest_path(path).is_file())
    sound = [
        path
        for path in whole
        if doubtful_from is None or parse_checkpoint_step(path) < doubtful_from
    ]
    kept = {*sound[-count:], *whole[-1:]}
    for path in files:
        if path not in kept and path.name not in spare:
            delete_checkpoint(path)


def find_checkpoint(ckpt: str, *, name: str = "ckpt") -> Path:
    """The file that `ckpt`, a file or a run directory (its newest checkpoint), stands for.

    Raises CheckpointError, which calls it `name`, where there is none.
    """
    path = resolve_path(ckpt)
    if path.is_dir():
        last = find_newest_checkpoint(path / "checkpoints")
        if last is None:
            raise CheckpointError(
                f"{name}='{ckpt}' has no checkpoint (yet) in {path / 'checkpoints'}. A run "
                "directory is what train.py made, such as runs/my-run"
            )
        return last
    if not path.is_file():
        raise CheckpointError(format_unknown_checkpoint(ckpt, name))
    return path


def manifest_path(path: Path) -> Path:
    """Where the manifest of a checkpoint lies."""
    return path.with_name(path.name + ".json")


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint, manifest first."""
    manifest_path(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def load_module_state(module: nn.Module, state: dict, *, what: str) -> None:
    """Load a state dict; CheckpointError names the first differences with both shapes."""
    check_module_state(module, state, what=what)
    module.load_state_dict(state)


def check_module_state(module: nn.Module, state: dict, *, what: str) -> None:
    """Raise CheckpointError where a state dict has other names or shapes than the module."""
    own = module.state_dict()
    wrong = [f"{name} is missing" for name in own if name not in state]
    wrong += [f"{name} is unknown" for name in state if name not in own]
    wrong += [
        f"{name} is {tuple(state[name].shape)} in the file and {tuple(own[name].shape)} here"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    wrong += [
        f"{name} is {state[name].dtype} in the file and {own[name].dtype} here"
        for name in own
        if name in state and state[name].is_floating_point() != own[name].is_floating_point()
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"{what} does not fit: {'; '.join(wrong[:3])}{more}")


def select_prefix(payload: dict, prefix: str) -> dict:
    """The tensors of a checkpoint whose names begin with `prefix`, without it."""
    state = payload["state_dict"]
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def format_unknown_checkpoint(ckpt: str, name: str) -> str:
    """That the checkpoint `ckpt`, of a setting `name`, is not there, and the nearest that are."""
    known = sorted(str(found.parent.parent) for found in Path("runs").glob("**/last.ckpt"))
    near = difflib.get_close_matches(ckpt, known, n=3, cutoff=0)
    hint = f"; the nearest here: {', '.join(near)}" if near else ""
    return f"{name}='{ckpt}' is neither a run directory nor a file{hint}"
