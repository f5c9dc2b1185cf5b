"""Bundles: a trained model in one folder, without pickles, for other machines.

bundle.json       stage, step, digests of the frozen components, size and SHA-256 of each file
config.yaml       the configuration of the training
denoiser.safetensors      the averaged weights
autoencoder/ ..   the frozen components that were copied; README.md: the model card
"""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.utils.checkpoint_file import CheckpointError, manifest_path
from ldm.utils.files import BUNDLE_FILE, read_json, read_text, write_text
from ldm.utils.hashing import hash_file, hash_weights_folder

BUNDLE_CONFIG_FILE = "config.yaml"
BUNDLE_WEIGHTS_FILE = "denoiser.safetensors"
BUNDLE_DATA_FILES = (BUNDLE_WEIGHTS_FILE, BUNDLE_CONFIG_FILE)
BUNDLE_FORMAT = 1
BundleFiles = Mapping[str, Mapping[str, int | str]]  # size and sha256 of files, by their paths
NO_FILES: BundleFiles = MappingProxyType({})
MAX_BUNDLE_BYTES = 2**20  # of bundle.json and config.yaml


def is_bundle(folder: Path) -> bool:
    """Returns whether a folder is a bundle, whole or damaged."""
    return (folder / BUNDLE_FILE).is_file()


def write_bundle_weights(folder: Path, weights: dict[str, Tensor], config: str) -> None:
    """Writes the weights and the configuration of a bundle."""
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / BUNDLE_WEIGHTS_FILE)
    write_text(folder / BUNDLE_CONFIG_FILE, config)


def write_bundle_manifest(folder: Path, facts: dict, known: BundleFiles = NO_FILES) -> BundleFiles:
    """Writes bundle.json: `facts`, and the digests of all files, which it returns."""
    files = describe_bundle_files(folder, known)
    whole = {"format": BUNDLE_FORMAT, **facts, "files": files}
    write_text(folder / BUNDLE_FILE, json.dumps(whole, indent=1) + "\n")
    mode = (folder / BUNDLE_FILE).stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)  # safetensors writes files for their owner alone
    return files


def describe_bundle_files(folder: Path, known: BundleFiles = NO_FILES) -> BundleFiles:
    """Returns size and SHA-256 of each file in a folder, by its path; without bundle.json.

    known: what an earlier call returned of files that have not changed; they are not read again.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {
        name: known.get(name) or {"size": path.stat().st_size, "sha256": hash_file(path)}
        for name, path in names.items()
        if name != BUNDLE_FILE
    }


def read_bundle(folder: Path) -> tuple[dict, dict[str, str]]:
    """Returns a bundle as the payload of a checkpoint, and the paths of frozen components.

    Raises CheckpointError if a copied component is missing, and if weights or configuration do not
    have their digests; whoever builds a frozen component compares it with its own digest in the
    payload.
    """
    facts = read_bundle_manifest(folder)
    copies = {name: str(folder / place) for name, place in facts["copies"].items()}
    for place in copies.values():  # a component that is not here would be searched on the hub
        if not Path(place).exists():
            raise CheckpointError(f"{folder} is no whole bundle: {place} is missing")
    for name, digest in facts["digests"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} is no whole bundle: {name} is missing")
        if hash_file(path) != digest:
            raise CheckpointError(f"{path} does not have the digest in {BUNDLE_FILE}")
    try:
        weights = load_file(folder / BUNDLE_WEIGHTS_FILE)
        config = read_text(folder / BUNDLE_CONFIG_FILE, max_bytes=MAX_BUNDLE_BYTES)
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{folder} cannot be used: {error}") from error
    # float(): not every dtype has isfinite.
    if not all(tensor.float().isfinite().all() for tensor in weights.values()):
        raise CheckpointError(f"{folder} cannot be used: its weights are not finite")
    payload = {
        "state_dict": {f"ema.module.{name}": tensor for name, tensor in weights.items()},
        "global_step": facts["step"],
        "ldm": {"stage": facts["stage"], "frozen": facts["frozen"], "config": config},
    }
    return payload, copies


def read_weights_digest(path: Path) -> str:
    """Returns the SHA-256 of a checkpoint file, or of the weights of a bundle or another folder."""
    if is_bundle(path):
        return read_bundle_manifest(path)["digests"][BUNDLE_WEIGHTS_FILE]
    if path.is_dir():
        return hash_weights_folder(path)
    manifest = manifest_path(path)
    return read_json(manifest)["sha256"] if manifest.is_file() else hash_file(path)


def read_bundle_manifest(folder: Path) -> dict:
    """Returns bundle.json; raises CheckpointError if it is damaged or of another format."""
    path = folder / BUNDLE_FILE
    try:
        facts = read_json(path, max_bytes=MAX_BUNDLE_BYTES)
        if (version := facts["format"]) != BUNDLE_FORMAT:
            raise ValueError(f"its format is {version!r:.20}, and this ldm reads {BUNDLE_FORMAT}")
        needed = {key: facts[key] for key in ("step", "stage", "frozen", "copies")}
        for place in map(PurePosixPath, needed["copies"].values()):
            if place.is_absolute() or ".." in place.parts:
                raise ValueError(f"{str(place)!r:.80} is outside of the bundle")
        digests = {name: str(facts["files"][name]["sha256"]) for name in BUNDLE_DATA_FILES}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error
    return {**needed, "digests": digests}
