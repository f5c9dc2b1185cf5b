"""The kernels of the networks, chosen by device, dtype and size."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_POSITION_PAIRS = 2**20  # N L, up to which the scores of an attention are computed as a matrix
MAX_STORED_SCORES = 2**26  # B heads N L: 128 MiB, kept for the backward pass
SCORES_AT_ONCE = 2**20  # 2 MiB, which stay in the cache of a core


def choose_memory_format(device_type: str, dtype: torch.dtype | None) -> torch.memory_format:
    """Returns the fastest layout of images and weights in training; dtype: of autocast."""
    # torch's group norm on a CPU is slow in bfloat16 and channels_last, above all backward.
    is_slow = device_type == "cpu" and dtype is torch.bfloat16
    return torch.contiguous_format if is_slow else torch.channels_last


@contextmanager
def cache_casts(network: nn.Module) -> Iterator[None]:
    """Lets autocast cast each weight of a frozen network once in its context, not in each call.

    It keeps the casts of weights that require gradients alone. Without gradients none is computed.
    """
    plain = [each for each in network.parameters() if type(each) is nn.Parameter]  # no shards
    frozen = [each for each in plain if not each.requires_grad]
    frozen = [each for each in frozen if torch.is_autocast_enabled(each.device.type)]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def freeze_weights(network: nn.Module) -> Iterator[None]:
    """Lets autograd record nothing for weights, such as those that `cache_casts` marks."""
    marked = [each for each in network.parameters() if each.requires_grad]
    try:
        for parameter in marked:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in marked:
            parameter.requires_grad_(True)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of q (B, heads, N, d) to k and v (B, heads, L, d) -> as q.

    mask (B, 1, 1, L): True is attended.
    """
    if mask is None and _has_slow_backward(q, k):
        with torch.autocast("cpu", enabled=False):  # it would make the scores float32
            return _attend_by_matrix_products(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _has_slow_backward(q: Tensor, k: Tensor) -> bool:
    """Returns whether torch's fused attention has a backward pass that is slower than products."""
    pairs = q.shape[2] * k.shape[2]
    return (
        q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and q.requires_grad
        and pairs <= MAX_POSITION_PAIRS
        and q.shape[0] * q.shape[1] * pairs <= MAX_STORED_SCORES
    )


def _attend_by_matrix_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    shape, scale = q.shape, q.shape[-1] ** -0.5
    q, k, v = (q * scale).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (B heads, N or L, d)
    rows = max(1, SCORES_AT_ONCE // (q.shape[1] * k.shape[1]))
    if torch.compiler.is_compiling():
        rows = len(q)  # one graph for all batch sizes
    parts = zip(q.split(rows), k.split(rows), v.split(rows), strict=True)
    mixed = [torch.bmm((a @ b.mT).softmax(-1), c) for a, b, c in parts]
    return torch.cat(mixed).view(shape)
