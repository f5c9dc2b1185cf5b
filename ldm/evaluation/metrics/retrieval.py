"""Retrieval: how many others rank before the right item of a query."""

import torch
from torch import Tensor

QUERIES_PER_CHUNK = 256  # queries that are compared with all items at once


def compute_retrieval_ranks(queries: Tensor, items: Tensor, pairs: Tensor) -> Tensor:
    """Returns how many items are nearer to each query (n,) than the nearest one of its own.

    queries (n, D), items (m, D): unit vectors. pairs (P, 2): numbers of a query and of an item that
    is its own; each query has one or more.
    """
    ranks = []
    for first in range(0, len(queries), QUERIES_PER_CHUNK):
        cosines = queries[first : first + QUERIES_PER_CHUNK] @ items.T  # (c, m)
        own = pairs[(pairs[:, 0] >= first) & (pairs[:, 0] < first + len(cosines))]
        rows, best = own[:, 0] - first, cosines.new_full((len(cosines),), -torch.inf)
        best.scatter_reduce_(0, rows, cosines[rows, own[:, 1]], "amax")
        ranks.append((cosines > best[:, None]).sum(1))
    return torch.cat(ranks)
