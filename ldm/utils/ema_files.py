"""Averages of a run's weights as files: <folder>/step=*.safetensors, several of one step in one.

Tensors are named LENGTH/NAME, as 0.05/conv_in.weight; the file's metadata says step and lengths.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ldm.utils.files import delete_temporary_files, replace_file


class SnapshotError(ValueError):
    """A snapshot that cannot be read."""


class Snapshot(NamedTuple):
    """One average at one step, and the file that it is in."""

    length: float
    step: int
    path: Path


def write_snapshot(folder: Path, step: int, averages: Mapping[float, Mapping[str, Tensor]]) -> None:
    """Store the state dicts of a step's averages, by length, in a file that is whole or not there.

    Raises OSError where it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{length}/{name}": tensor.detach().cpu().contiguous()
        for length, state in averages.items()
        for name, tensor in state.items()
    }
    facts = json.dumps({"step": step, "lengths": list(averages)})
    with replace_file(_path(folder, step)) as file:
        file.write(save(tensors, metadata={"ldm": facts}))


def delete_snapshots_after(folder: Path, *, after: int) -> None:
    """Delete the snapshots of steps after `after`, and what a kill has left under other names."""
    delete_temporary_files(folder, "step=*")
    for path in folder.glob("step=*.safetensors"):
        if path > _path(folder, after):
            path.unlink(missing_ok=True)


def find_snapshots(folder: Path, *, until: int) -> list[Snapshot]:
    """The snapshots of a folder up to step `until`, in order; SnapshotError names a damaged one."""
    found = []
    for path in sorted(folder.glob("step=*.safetensors")):
        if path > _path(folder, until):
            break
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads(file.metadata()["ldm"])
            step, lengths = int(facts["step"]), [float(length) for length in facts["lengths"]]
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise SnapshotError(
                f"{path} is no snapshot, or not a whole one ({error!r}): delete it, the others "
                "will do"
            ) from error
        found += [Snapshot(length, step, path) for length in lengths]
    return found


def combine_snapshots(
    snapshots: Sequence[Snapshot],
    weights: Sequence[float],
    *,
    on_progress: Callable[[], object] = lambda: None,
) -> dict[str, Tensor]:
    """The state dict that is the sum of the snapshots' times their shares, summed in float64.

    What is not of floating point is the last one's. `done()` is called after each snapshot.
    Raises SnapshotError where they are not of one network.
    """
    total: dict[str, Tensor] = {}
    kinds: dict[str, torch.dtype] = {}
    for snapshot, share in zip(snapshots, weights, strict=True):
        prefix = f"{snapshot.length}/"
        with safe_open(snapshot.path, "pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            tensors = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
        if total and _shapes(tensors) != _shapes(total):
            raise SnapshotError(f"{snapshot.path} is of another network than those before it")
        for name, tensor in tensors.items():
            kinds[name] = tensor.dtype
            if not tensor.is_floating_point():
                total[name] = tensor
            elif name in total:
                total[name].add_(tensor, alpha=share)
            else:
                total[name] = tensor.double().mul_(share)
        on_progress()
    return {name: tensor.to(kinds[name]) for name, tensor in total.items()}


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def _path(folder: Path, step: int) -> Path:
    return folder / f"step={step:08d}.safetensors"
