"""Real pictures as feature networks see them: computed once, kept with all that they depend on.

Shapes: M real pictures, D features.
"""

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.data.dataset import TextImageDataset
from ldm.evaluation.distributed import ProcessGroup
from ldm.evaluation.feature_table import tabulate
from ldm.evaluation.features.base import FeatureExtractor
from ldm.evaluation.prompt_subset import SUBSET_VERSION as ORDER
from ldm.evaluation.prompt_subset import shuffle_indices
from ldm.evaluation.tensor_cache import (
    DamagedTensorFileError,
    hash_facts,
    read_tensor_file,
    write_tensor_file,
)

REAL_FEATURES_VERSION = 2  # of what is below: another one computes anew


def compute_real_features(
    networks: Sequence[FeatureExtractor],
    dataset: TextImageDataset,
    indices: range,
    *,
    size: int,
    batch: int,
    cache: Path,
    device: torch.device,
    done: Callable[[range], None] = lambda items: None,
) -> dict[str, Tensor]:
    """float32 tables (len(places), D) by network: of the pictures at these places of `shuffled`.

    pictures: those of a validation, cut to their centre, `size` pixels wide. Tables are kept in
    `cache`, one file for each network, picture set, places and size, and read from there; so are
    the pieces of those that are not complete. A damaged file is made anew with a warning.
    Raises ValueError where a kept file says of itself that it is of something else, or where the
    pictures have another size.
    """
    tables, missing, files = {}, [], {}
    for network in networks:
        facts = describe_real_features(network, dataset, indices, size=size)
        path = cache / f"real-{network.name}-{hash_facts(facts)}.safetensors"
        files[network.name] = path, facts
        table = find_feature_table(path, facts, width=network.width)
        # One process may see the file that another is about to write: they must go the same way.
        if ProcessGroup().any(table is None):
            missing.append(network)
        else:
            tables[network.name] = table
    if missing:
        order = shuffle_indices(len(dataset))[indices.start : indices.stop]

        def make(items: range) -> Mapping[str, Tensor]:
            images = torch.stack([dataset[order[i], order[i]]["images"] for i in items])
            if images.shape[2:] != (size, size):
                raise ValueError(
                    f"the real pictures are {tuple(images.shape[2:])} pixels, those to compare "
                    f"them with {size}: give both in one size"
                )
            images = images.to(device)
            return {network.name: network(images) for network in missing}

        columns = {network.name: network.width for network in missing}
        pieces = cache / f"pieces-{hash_facts([files[name][0].name for name in columns])}"
        made = tabulate(len(order), make, columns=columns, batch=batch, folder=pieces, done=done)
        if ProcessGroup().rank == 0:
            for name, table in made.items():
                path, facts = files[name]
                try:
                    write_tensor_file(path, {"features": table}, facts=facts)
                except OSError as error:  # a full disk, or another's folder
                    warnings.warn(f"{path} cannot be written: {error}", stacklevel=2)
            shutil.rmtree(pieces, ignore_errors=True)
        tables |= made
    return tables


def describe_real_features(
    network: FeatureExtractor, dataset: TextImageDataset, indices: range, *, size: int
) -> dict:
    """All that real features depend on, as plain values."""
    return {
        "version": [REAL_FEATURES_VERSION, ORDER],
        "network": network.name,
        "network_digest": network.digest,
        "data": dataset.shards.index.fingerprint,
        "places": [indices.start, indices.stop],
        "size": size,
        "crop": "center",
    }


def find_feature_table(path: Path, facts: dict, *, width: int) -> Tensor | None:
    """The table (M, width) in a file of these facts; None where there is none that is whole."""
    if not path.is_file():
        return None
    try:
        tables, found = read_tensor_file(path)
    except DamagedTensorFileError as error:
        warnings.warn(f"{error}: it is made anew", stacklevel=3)
        return None
    start, stop = facts["places"]
    shape = (stop - start, width)
    differing = [key for key in facts if found.get(key) != facts[key]]
    told = [f"{key} {found.get(key)} for {facts[key]}" for key in differing]
    if not told and {name: tuple(table.shape) for name, table in tables.items()} != {
        "features": shape
    }:
        told = [f"tables {sorted(tables)} for features {shape}"]
    if told:
        raise ValueError(f"{path} is of something else ({', '.join(told)}): delete it")
    return tables["features"]
