"""Folders of diffusers: config.json, and the weights next to it."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.utils.files import read_json_mapping, replace_file, resolve_path, write_text
from ldm.utils.hub import download_snapshot

DIFFUSERS_VERSION = "0.38.0"  # written to files: the oldest version that the tests allow
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
# In this order: the weights, in parts, in half precision, and pickled.
DIFFUSERS_WEIGHT_FILES = (
    DIFFUSERS_WEIGHTS,
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.safetensors.index.fp16.json",
    "diffusion_pytorch_model.bin",
)


def locate_diffusers_folder(path: str) -> Path:
    """Returns a folder or file that is here, or the local copy of a model of the hub."""
    location = resolve_path(path)
    if location.exists():
        return location
    return download_snapshot(
        path,
        ["config.json", "*.safetensors"],
        subject=f"no autoencoder at '{path}': it",
        remedy=f"give a folder with config.json and {DIFFUSERS_WEIGHTS}, or for autoencoder=tiny "
        "and autoencoder=sd a run of stage=autoencoder",
    )


def find_diffusers_weights(path: Path | str) -> Path:
    """Returns the weights file of a folder, or the file itself; FileNotFoundError without one."""
    path = Path(path)
    files = [path / name for name in DIFFUSERS_WEIGHT_FILES] if path.is_dir() else [path]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"no weights at {path}: looked for {', '.join(map(str, files))}")
    return file


def read_diffusers_config(file: Path) -> dict[str, object]:
    """Returns the config.json of a folder, or of the folder of a weights file."""
    path = (file if file.is_dir() else file.parent) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{file} needs its config.json next to it: copy it to {path}")
    return read_json_mapping(path)


def read_diffusers_weights(file: Path) -> dict[str, Tensor]:
    """Returns the tensors of a weights file under diffusers' names; no pickle runs code."""
    files = list_weight_parts(file) if file.suffix == ".json" else [file]
    parts = [_read_tensors(each) for each in files]
    return {name: tensor for part in parts for name, tensor in part.items()}


def list_weight_parts(index: Path) -> list[Path]:
    """Returns the files that the index of weights in parts names, all next to it."""
    names = read_json_mapping(index).get("weight_map")
    names = list(names.values()) if isinstance(names, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{index} has no weight_map from names of weights to files")
    parts = [index.with_name(name) for name in sorted(set(names)) if Path(name).name == name]
    if len(parts) < len(set(names)) or any(part.suffix == ".json" for part in parts):
        raise ValueError(f"{index} names files of other folders, or none of weights")
    if missing := [part.name for part in parts if not part.is_file()]:
        raise FileNotFoundError(
            f"{index} names {', '.join(missing[:3])}, not there: has its download finished?"
        )
    return parts


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of one file; ValueError where it holds anything else, or NaN."""
    if file.suffix == ".safetensors":
        try:
            state = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is no whole safetensors file: {error}") from error
    else:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # of many types
            raise ValueError(
                f"{file} is damaged, or holds code in place of weights: it was not opened "
                f"({type(error).__name__})"
            ) from error
        if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
        ):
            raise ValueError(f"{file} holds more, or other things, than tensors by name")
    check_weights_finite(state, what=str(file))
    return state


def check_weights_finite(state: Mapping[str, Tensor], *, what: str) -> None:
    """Raises ValueError for weights that are not finite, with which all pictures are black."""
    # float8 has no isfinite.
    floats = {name: value for name, value in state.items() if value.is_floating_point()}
    for name, value in floats.items():
        wide = value.half() if value.element_size() == 1 else value
        if not wide.isfinite().all():
            raise ValueError(f"{what}: {name} is not finite (NaN): take an undamaged file")


def write_diffusers_folder(
    folder: Path,
    config: Mapping[str, object],
    state: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None,
    weights: str = DIFFUSERS_WEIGHTS,
) -> None:
    """Writes config.json and the weights into a folder, which is made.

    dtype: of the file; None: of each tensor. weights: the name of the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: value.to(device="cpu", dtype=dtype).contiguous() for name, value in state.items()
    }
    write_text(folder / "config.json", json.dumps(config, indent=1) + "\n")
    with replace_file(folder / weights) as file:
        save_file(tensors, file.name, metadata={"format": "pt"})
    # safetensors writes for the user alone; the folder may belong to a team.
    shutil.copymode(folder / "config.json", folder / weights)
