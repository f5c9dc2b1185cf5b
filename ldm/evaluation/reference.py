"""Features of real images, computed once and saved in a cache.

Shapes: M real images, D features.
"""

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.data.dataset import TextImageDataset
from ldm.data.image_decoding import TargetSize, describe_size, get_sides
from ldm.evaluation.distributed import ProcessGroup
from ldm.evaluation.feature_table import tabulate
from ldm.evaluation.features.base import FeatureExtractor
from ldm.evaluation.prompt_subset import SUBSET_VERSION, shuffle_indices
from ldm.evaluation.tensor_cache import (
    DamagedTensorFileError,
    hash_facts,
    read_tensor_file,
    write_tensor_file,
)

REAL_FEATURES_VERSION = 2  # another version of the code below: cached features are not used


def compute_real_features(
    networks: Sequence[FeatureExtractor],
    dataset: TextImageDataset,
    indices: range,
    *,
    size: TargetSize,
    batch: int,
    cache: Path,
    device: torch.device,
    done: Callable[[range], None] = lambda items: None,
) -> dict[str, Tensor]:
    """Returns float32 tables (len(indices), D) by network, of the images at these shuffled indices.

    dataset: of a validation, with centre crops of `size` pixels. cache: a folder for the tables and
    the pieces of incomplete ones; a damaged file is made again with a warning.
    """
    ranks, tables, missing, files = ProcessGroup(), {}, [], {}
    for network in networks:
        facts = describe_real_features(network, dataset, indices, size=size)
        path = cache / f"real-{network.name}-{hash_facts(facts)}.safetensors"
        files[network.name] = path, facts
        table = find_feature_table(path, facts, width=network.width)
        # A process may see the file that another is about to write: all must decide the same.
        if ranks.any(table is None):
            missing.append(network)
        else:
            tables[network.name] = table
    if not missing:
        return tables
    order = shuffle_indices(len(dataset))[indices.start : indices.stop]

    def make(items: range) -> Mapping[str, Tensor]:
        images = torch.stack([dataset[order[i], order[i]]["images"] for i in items])
        if images.shape[2:] != get_sides(size):
            raise ValueError(
                f"the real images are {tuple(images.shape[2:])} pixels, those to compare "
                f"them with {size}: give both in one size"
            )
        images = images.to(device)
        return {network.name: network(images) for network in missing}

    columns = {network.name: network.width for network in missing}
    pieces = cache / f"pieces-{hash_facts([files[name][0].name for name in columns])}"
    made = tabulate(len(order), make, columns=columns, batch=batch, folder=pieces, done=done)
    if ranks.rank == 0:
        for name, table in made.items():
            path, facts = files[name]
            try:
                write_tensor_file(path, {"features": table}, facts=facts)
            except OSError as error:  # a full disk, or another user's folder
                warnings.warn(f"{path} cannot be written: {error}", stacklevel=2)
        shutil.rmtree(pieces, ignore_errors=True)
    return tables | made


def describe_real_features(
    network: FeatureExtractor, dataset: TextImageDataset, indices: range, *, size: TargetSize
) -> dict:
    """Returns all that features of real images depend on, as plain values."""
    return {
        "version": [REAL_FEATURES_VERSION, SUBSET_VERSION],
        "network": network.name,
        "network_digest": network.digest,
        "data": dataset.shards.index.fingerprint,
        "places": [indices.start, indices.stop],
        "size": describe_size(size),
        "crop": "center",
    }


def find_feature_table(path: Path, facts: dict, *, width: int) -> Tensor | None:
    """Returns the table (M, width) of a file with these facts; None if missing or damaged."""
    if not path.is_file():
        return None
    try:
        tables, saved = read_tensor_file(path)
    except DamagedTensorFileError as error:
        warnings.warn(f"{error}: it is made again", stacklevel=3)
        return None
    start, stop = facts["places"]
    wanted = facts | {"tables": {"features": (stop - start, width)}}
    found = saved | {"tables": {name: tuple(table.shape) for name, table in tables.items()}}
    if differ := [key for key in wanted if found.get(key) != wanted[key]]:
        problems = ", ".join(f"{key} {found.get(key)} for {wanted[key]}" for key in differ)
        raise ValueError(f"{path} is of something else ({problems}): delete it")
    return tables["features"]
