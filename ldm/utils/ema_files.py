"""EMA snapshots of a run's weights: <folder>/step=*.safetensors, all lengths of a step in one file.

Tensors are named LENGTH/NAME, as 0.05/conv_in.weight; the metadata has step and lengths.
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
    """A snapshot file that cannot be read."""


class Snapshot(NamedTuple):
    """The average of one length at one step, and its file."""

    length: float
    step: int
    path: Path


def write_snapshot(folder: Path, step: int, averages: Mapping[float, Mapping[str, Tensor]]) -> None:
    """Stores the state dicts of a step's averages, by length."""
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
    """Deletes the snapshots of steps after `after`, and temporary files of killed saves."""
    delete_temporary_files(folder, "step=*")
    for path in folder.glob("step=*.safetensors"):
        if path > _path(folder, after):
            path.unlink(missing_ok=True)


def find_snapshots(folder: Path, *, until: int) -> list[Snapshot]:
    """Returns the snapshots up to step `until`, in order; SnapshotError names a damaged file."""
    snapshots = []
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
        snapshots += [Snapshot(length, step, path) for length in lengths]
    return snapshots


def combine_snapshots(
    snapshots: Sequence[Snapshot],
    weights: Sequence[float],
    *,
    on_progress: Callable[[], object] = lambda: None,
) -> dict[str, Tensor]:
    """Returns the weighted sum of the snapshots' state dicts, summed in float64.

    Integer tensors are those of the last one. on_progress: called after each snapshot.
    """
    total: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for snapshot, weight in zip(snapshots, weights, strict=True):
        prefix = f"{snapshot.length}/"
        with safe_open(snapshot.path, "pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            tensors = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
        if total and _shapes(tensors) != _shapes(total):
            raise SnapshotError(f"{snapshot.path} is of another network than those before it")
        for name, tensor in tensors.items():
            dtypes[name] = tensor.dtype
            if not tensor.is_floating_point():
                total[name] = tensor
            elif name in total:
                total[name].add_(tensor, alpha=weight)
            else:
                total[name] = tensor.double().mul_(weight)
        on_progress()
    return {name: tensor.to(dtypes[name]) for name, tensor in total.items()}


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def _path(folder: Path, step: int) -> Path:
    return folder / f"step={step:08d}.safetensors"
