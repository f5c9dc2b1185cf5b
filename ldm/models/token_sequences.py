"""Feature maps as sequences of tokens, and batches of repeated images.

Shapes: B batch, C channels, h w grid, N = h w tokens.
"""

import torch.nn.functional as F
from torch import Tensor, nn


def to_sequence(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, N, C); a view if x is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_grid(x: Tensor, *, like: Tensor) -> Tensor:
    """(B, N, C) -> (B, C, h, w) on the grid of `like`."""
    return x.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


def apply_to_sequence(conv: nn.Module, x: Tensor) -> Tensor:
    """A 1x1 convolution of (B, N, C) -> (B, N, out): the linear map that it is."""
    if not isinstance(conv, nn.Conv2d):  # a layer of peft, whose weight lacks the adapter
        return conv(x.mT[..., None]).squeeze(-1).mT
    weight = conv.weight
    if weight.stride(-1) != 1:  # channels_last: DDP wants a gradient of the same strides
        weight = weight.permute(0, 2, 3, 1)
    return F.linear(x, weight.flatten(1), conv.bias)


def repeat_like(x: Tensor, like: Tensor) -> Tensor:
    """(B, ..) as often one after another as the batch of `like` is longer."""
    copies = len(like) // len(x) if len(x) else 1
    return x if copies == 1 else x.repeat(copies, *[1] * (x.ndim - 1))
