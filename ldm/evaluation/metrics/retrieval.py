"""Pictures and captions of a shard set in CLIP's space, and how well they find one another.

Shapes: N pictures, U captions, each different one once, P pairs of both, D features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.data.dataset import TextImageDataset
from ldm.data.shards.reader import ShardReader
from ldm.evaluation.features.clip import ClipFeatures
from ldm.evaluation.prompt_subset import shuffle_indices
from ldm.evaluation.reference import compute_real_features, find_feature_table
from ldm.evaluation.tensor_cache import hash_facts, write_tensor_file

CAPTION_FEATURES_VERSION = 1  # of the kept captions: another one computes anew
QUERIES_PER_CHUNK = 256  # queries at once against all there is
RetrievalProgress = Callable[[range], None]


@dataclass(frozen=True)
class ImageCaptionPairs:
    """What a shard set says: captions (U), and pairs (P, 2) of a picture's and a caption's number.

    firsts: the first caption of each picture, for people.
    """

    captions: list[str]
    pairs: Tensor
    first_captions: list[str]


def read_image_caption_pairs(
    shards: ShardReader, *, done: RetrievalProgress = lambda items: None
) -> ImageCaptionPairs:
    """All captions of all pictures, read from the disk."""
    number: dict[str, int] = {}
    pairs, firsts = [], []
    for i in range(len(shards)):
        captions = shards.read(i).captions
        firsts.append(captions[0])
        pairs += [(i, number.setdefault(text, len(number))) for text in dict.fromkeys(captions)]
        done(range(i, i + 1))
    return ImageCaptionPairs(list(number), torch.tensor(pairs), firsts)


def compute_image_vectors(
    clip: ClipFeatures,
    dataset: TextImageDataset,
    *,
    batch: int,
    cache: Path,
    device: torch.device,
    done: RetrievalProgress = lambda items: None,
) -> Tensor:
    """Unit vectors (N, D) on the host, in the set's order; kept in `cache` as `real_features` does.

    pictures: of the network's own size. Raises what `real_features` raises.
    """
    places = range(len(dataset))
    how = {"size": clip.size, "batch": batch, "cache": cache, "device": device, "done": done}
    table = compute_real_features([clip], dataset, places, **how)[clip.name]
    vectors = torch.empty_like(table)
    vectors[shuffle_indices(len(dataset))] = F.normalize(table, dim=1)
    return vectors


def compute_caption_vectors(
    clip: ClipFeatures,
    captions: Sequence[str],
    *,
    batch: int,
    cache: Path,
    device: torch.device,
    done: RetrievalProgress = lambda items: None,
) -> Tensor:
    """Unit vectors (U, D) on the host, kept in a file of `cache` and read from there.

    Raises ValueError where the file says of itself that it is of something else.
    """
    facts = {
        "version": CAPTION_FEATURES_VERSION,
        "network_digest": clip.digest,
        "captions": hash_facts(list(captions)),
        "places": [0, len(captions)],
    }
    path = cache / f"captions-{clip.name}-{hash_facts(facts)}.safetensors"
    if (table := find_feature_table(path, facts, width=clip.width)) is not None:
        return table
    parts = []
    for first in range(0, len(captions), batch):
        items = range(first, min(first + batch, len(captions)))
        parts.append(clip.texts(captions[items.start : items.stop], device=device).cpu())
        done(items)
    table = torch.cat(parts)
    write_tensor_file(path, {"features": table}, facts=facts)
    return table


def compute_retrieval_ranks(queries: Tensor, items: Tensor, pairs: Tensor) -> Tensor:
    """How many items are nearer to each query (n,) than the nearest one of its own.

    queries (n, D), items (m, D): unit vectors; pairs (P, 2): numbers of a query and of an item that
    is its own. Each query has one or more.
    """
    found = []
    for first in range(0, len(queries), QUERIES_PER_CHUNK):
        cosines = queries[first : first + QUERIES_PER_CHUNK] @ items.T  # (c, m)
        own = pairs[(pairs[:, 0] >= first) & (pairs[:, 0] < first + len(cosines))]
        rows, best = own[:, 0] - first, cosines.new_full((len(cosines),), -torch.inf)
        best.scatter_reduce_(0, rows, cosines[rows, own[:, 1]], "amax")
        found.append((cosines > best[:, None]).sum(1))
    return torch.cat(found)
