"""Checkpoint files: written so that a kill loses nothing, read without running their code.

A checkpoint is `<name>.ckpt`, tensors and plain values for `torch.load(weights_only=True)`, and
`<name>.ckpt.json`, its manifest with size and SHA-256, which is written last: without a valid
manifest the checkpoint does not count. `last.ckpt` is a link to the newest checkpoint, `best.ckpt`
to the one with the best validation.
"""

import hashlib
import json
import os
import secrets
import shutil
import warnings
import zipfile
from collections.abc import Collection, Iterator
from errno import ENOSPC
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from ldm.utils.errors import format_unknown_checkpoint
from ldm.utils.files import (
    TEMPORARY_SUFFIX,
    delete_temporary_files,
    read_json,
    replace_file,
    resolve_path,
    write_text,
)
from ldm.utils.hashing import hash_file
from ldm.utils.lora_weights import merge_adapters


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or does not fit."""


class _HashingWriter:
    """A file that hashes what is written to it, and stores the error of a failed write."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self.sha256.update(data)
            return self.file.write(data)
        except OSError as error:  # torch.save raises a RuntimeError instead
            self.error = error
            raise

    def flush(self) -> None:
        """Does nothing: `replace_file` flushes."""


def write_checkpoint(payload: dict, path: Path) -> None:
    """Stores `payload`, reads it back, writes its manifest; on an OSError nothing is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    manifest_path(path).unlink(missing_ok=True)  # it must not describe a half-written file
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
    """Returns the bytes of all tensors in nested dicts and lists; what is shared counts once."""
    return sum({(each.data_ptr(), each.nbytes): each.nbytes for each in _tensors(payload)}.values())


def _tensors(payload: object) -> Iterator[Tensor]:
    if isinstance(payload, Tensor):
        yield payload
    parts = payload.values() if isinstance(payload, dict) else payload
    for part in parts if isinstance(payload, dict | list | tuple) else ():
        yield from _tensors(part)


def export_weights(payload: dict, path: Path) -> None:
    """Writes weights, EMA ones if there are any, as safetensors, and step and settings as .json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = select_prefix(payload, "ema.module.") or payload["state_dict"]
    weights = merge_adapters(weights, payload["ldm"])
    facts = {"step": payload["global_step"], **payload["ldm"]}
    write_text(path.with_suffix(".json"), json.dumps(facts, indent=2) + "\n")
    with replace_file(path) as file:
        file.write(to_safetensors({name: t.contiguous() for name, t in weights.items()}))


def link_last_checkpoint(path: Path) -> None:
    """Links `last.ckpt` in the folder of `path` to it."""
    link_checkpoint(path, "last.ckpt")


def link_checkpoint(path: Path, name: str) -> None:
    """Links `name` in the folder of `path` to it."""
    temporary = path.with_name(f".{name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    temporary.symlink_to(path.name)
    os.replace(temporary, path.with_name(name))


def read_checkpoint(path: Path) -> dict:
    """Returns the payload, memory-mapped; CheckpointError if its manifest or content is wrong."""
    path = path.resolve()
    if problem := find_checkpoint_flaw(path):
        good = find_last_good_checkpoint(path.parent, other_than=path)
        more = f". The last good one in its folder is {good.name}" if good else ""
        raise CheckpointError(f"{path} cannot be used: {problem}{more}")
    return read_unverified_checkpoint(path)


def read_unverified_checkpoint(path: Path) -> dict:
    """Returns the payload like `read_checkpoint`, but does not check the manifest."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} is no checkpoint of ldm, or holds code in place of data: it was not opened "
            f"({type(error).__name__}). Take the file that train.py wrote"
        ) from error


def find_checkpoint_flaw(path: Path) -> str | None:
    """Returns why a checkpoint cannot be used; None if it can."""
    if not path.is_file():
        return "there is no such file"
    if not manifest_path(path).is_file():
        if not path.name.startswith("step="):
            return _find_archive_flaw(path)
        return (
            f"its manifest {manifest_path(path).name} is missing (a save that did not finish, or a "
            "copy without it?)"
        )
    try:
        manifest = read_json(manifest_path(path), max_bytes=2**16)
        size, digest = manifest["size"], manifest["sha256"]
    except (ValueError, KeyError, TypeError):
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


def _find_archive_flaw(path: Path) -> str | None:
    """Returns why a file that was copied without its manifest, such as best.ckpt, is not whole.

    Names of a run's own saves begin with step=. torch.save stores a checksum of each tensor.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(each.compress_type != zipfile.ZIP_STORED for each in archive.infolist()):
                return "it is compressed, and no file that train.py wrote"
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        return f"it has no manifest {manifest_path(path).name}, and is not whole ({error})"
    if damaged is not None:
        return f"its content does not have its checksums ({damaged})"
    return (
        "its weights are not finite: the training had failed"
        if has_nonfinite_weights(path)
        else None
    )


def find_newest_checkpoint(folder: Path) -> Path | None:
    """Returns the newest valid checkpoint of a folder; None if there is no checkpoint.

    It warns about newer ones that are damaged, and raises CheckpointError if all are: to start
    again silently would lose the run.
    """
    flaws: dict[Path, str] = {}
    for path in sorted(folder.glob("step=*.ckpt"), reverse=True):
        if problem := find_checkpoint_flaw(path):
            flaws[path] = problem
            continue
        step = parse_checkpoint_step(path)
        for damaged, problem in flaws.items():
            end = parse_checkpoint_step(damaged)
            lost = f"what was trained from step {step} to {end} is lost"
            warnings.warn(
                f"checkpoint {damaged} is passed over: {problem}. {path.name} is taken in its "
                f"place: {'no step is lost' if step == end else lost}",
                stacklevel=2,
            )
        return path
    if flaws:
        problems = "".join(f"\n  {path.name}: {problem}" for path, problem in flaws.items())
        raise CheckpointError(
            f"none of the {len(flaws)} checkpoints in {folder} is whole; move the folder away to "
            f"begin anew{problems}"
        )
    return None


def find_last_good_checkpoint(
    folder: Path, *, before: int | None = None, other_than: Path | None = None
) -> Path | None:
    """Returns the newest valid checkpoint of a folder, of those before a step; None without."""
    for path in sorted(folder.glob("step=*.ckpt"), reverse=True):
        early = before is None or parse_checkpoint_step(path) < before
        if early and path != other_than and find_checkpoint_flaw(path) is None:
            return path.resolve()
    return None


def has_nonfinite_weights(path: Path) -> bool:
    """Returns whether weights are not finite, for a manifest that does not say so."""
    try:
        weights = dict(read_unverified_checkpoint(path)["state_dict"]).values()
        # A view may claim to be larger than its file.
        plain = [weight for weight in weights if weight.nbytes <= weight.untyped_storage().nbytes()]
        return not all(weight.isfinite().all() for weight in plain)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError):
        return False  # whoever reads these weights raises the error


def parse_checkpoint_step(path: Path) -> int:
    """Returns the optimizer step in a name like step=00000250_end.ckpt; 0 if it has none."""
    digits = path.name.removeprefix("step=")[:8]
    return int(digits) if digits.isdecimal() else 0


def prune_checkpoints(
    folder: Path, count: int, *, spare: Collection[str] = (), doubtful_from: int | None = None
) -> None:
    """Deletes all checkpoints of a folder except the `count` newest with a manifest, and `spare`.

    Those of the step `doubtful_from` and later do not count, but the newest of them stays. It also
    deletes temporary files of killed saves.
    """
    delete_temporary_files(folder)
    files = [path for path in folder.glob("step=*.ckpt") if not path.is_dir()]
    whole = sorted(path for path in files if manifest_path(path).is_file())
    limit = float("inf") if doubtful_from is None else doubtful_from
    good = [path for path in whole if parse_checkpoint_step(path) < limit]
    keep = {*good[-count:], *whole[-1:]}
    for path in files:
        if path not in keep and path.name not in spare:
            delete_checkpoint(path)


def find_checkpoint(ckpt: str, *, name: str = "ckpt") -> Path:
    """Returns the file of a setting `name`: `ckpt` is a file, or a run directory (its newest)."""
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
    return path.with_name(path.name + ".json")


def delete_checkpoint(path: Path) -> None:
    """Deletes the manifest, then the checkpoint."""
    manifest_path(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def load_module_state(module: nn.Module, state: dict, *, what: str) -> None:
    """Loads a state dict after `check_module_state`."""
    check_module_state(module, state, what=what)
    module.load_state_dict(state)


def check_module_state(module: nn.Module, state: dict, *, what: str) -> None:
    """Raises CheckpointError with the first differences of names, shapes and kinds of numbers."""
    own = module.state_dict()
    wrong = [f"{name} is missing" for name in own if name not in state]
    wrong += [f"{name} is unknown" for name in state if name not in own]
    both = [(name, state[name], own[name]) for name in own if name in state]
    differ = [(name, tuple(a.shape), tuple(b.shape)) for name, a, b in both if a.shape != b.shape]
    for name, a, b in both:
        if a.is_floating_point() != b.is_floating_point():
            differ.append((name, a.dtype, b.dtype))
    wrong += [f"{name} is {theirs} in the file and {ours} here" for name, theirs, ours in differ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"{what} does not fit: {'; '.join(wrong[:3])}{more}")


def select_prefix(payload: dict, prefix: str) -> dict:
    """Returns the tensors whose names begin with `prefix`, without it."""
    state = payload["state_dict"]
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
