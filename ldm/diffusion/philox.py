"""Philox 4x64-10, a random number generator without state: a counter and a key to four words.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 4.1. Words are int64 with
the bits of unsigned integers. The counter of a word is (position and block, draw, blocks of an
image), so that a batch takes one call: by NumPy's implementation on the CPU, by operations on
tensors on any device.
Normal numbers are exact functions of the words, too: they come from a table of the quantile
function. A logarithm's or cosine's last digit differs between devices and places in a batch.
Shapes: B images, W words of an image, a multiple of 4, N blocks of 4 words.
"""

from collections.abc import Sequence
from functools import lru_cache
from threading import Lock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.utils.transfer import send

NUM_PHILOX_ROUNDS = 10
WORDS_PER_BLOCK = 4
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_LOW_BITS, _ALL_BITS = 2**32 - 1, 2**64 - 1
_NUMPY_PHILOX, _NUMPY_LOCK = np.random.Philox(key=0), Lock()
_CELL_BITS = 8  # of the mantissa: 256 cells from one power of two to the next
_CELL_SHIFT = 23 - _CELL_BITS  # float32 has 23 bits
_KEPT_BATCHES = 16  # all streams of a step have the same positions


def draw_philox_words(positions: Sequence[int], words: int, *, key: int, draw: int = 0) -> Tensor:
    """Words (B, W) on the CPU for images at `positions`, at least `words` each.

    key: below 2^128; draw: numbers the draws of one key. Consecutive positions are fast.
    """
    blocks = -(-words // WORDS_PER_BLOCK)
    state = {"bit_generator": "Philox", "buffer": (0,) * WORDS_PER_BLOCK, "has_uint32": 0}
    state |= {"buffer_pos": WORDS_PER_BLOCK, "uinteger": 0}  # nothing is left of earlier draws
    parts = []
    with _NUMPY_LOCK:
        for first, length in _split_into_runs(tuple(positions)):
            # NumPy's first block is the one after the counter.
            counter = ((first & _LOW_BITS) * blocks, first >> 32 & _ALL_BITS, draw, blocks)
            state["state"] = {"counter": counter, "key": (key & _ALL_BITS, key >> 64)}
            _NUMPY_PHILOX.state = state  # a new object takes ten times as long
            parts.append(_NUMPY_PHILOX.random_raw(length * blocks * WORDS_PER_BLOCK))
    drawn = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return torch.from_numpy(drawn.view(np.int64)).view(-1, blocks * WORDS_PER_BLOCK)


@lru_cache(_KEPT_BATCHES)
def _split_into_runs(positions: tuple[int, ...]) -> list[tuple[int, int]]:
    """First position and length of each run of positions whose counters follow each other."""
    runs: list[tuple[int, int]] = []
    for position in positions:
        first, length = runs[-1] if runs else (0, 0)
        if length and position == first + length and position & _LOW_BITS:
            runs[-1] = (first, length + 1)
        else:
            runs.append((position, 1))
    return runs


def compute_philox_words(
    positions: Tensor, words: int, *, round_keys: Tensor, draw: int = 0
) -> Tensor:
    """The same words (B, W) for positions (B,), computed on their device."""
    blocks = -(-words // WORDS_PER_BLOCK)
    offsets = torch.arange(1, blocks + 1, device=positions.device)
    first = ((positions & _LOW_BITS) * blocks)[:, None] + offsets  # (B, blocks)
    second = (positions >> 32)[:, None].expand_as(first)
    counter = torch.stack(
        [first, second, torch.full_like(first, draw), torch.full_like(first, blocks)]
    )  # (4, B, blocks)
    out = philox_4x64(counter.flatten(1), round_keys)  # (4, N)
    return out.T.contiguous().view(len(positions), blocks * WORDS_PER_BLOCK)


def philox_4x64(counter: Tensor, round_keys: Tensor) -> Tensor:
    """Four words (4, N) of the counters (4, N)."""
    multipliers = round_keys[NUM_PHILOX_ROUNDS]  # (2, 1)
    low, high = multipliers & _LOW_BITS, multipliers >> 32 & _LOW_BITS
    even, odd = counter[::2], counter[1::2]  # (2, N) each
    for key in round_keys[:NUM_PHILOX_ROUNDS].unbind():
        # The upper half of a product of 128 bits, by parts of 32: no part exceeds 64 bits.
        even_low, even_high = even & _LOW_BITS, even >> 32 & _LOW_BITS
        carry = (even_low * low) >> 32 & _LOW_BITS
        middle = torch.addcmul(carry, even_high, low)
        other = torch.addcmul(middle & _LOW_BITS, even_low, high)
        upper = torch.addcmul(middle >> 32 & _LOW_BITS, even_high, high)
        upper += other >> 32 & _LOW_BITS
        lower = even * multipliers
        even, odd = upper.flip(0) ^ odd ^ key, lower.flip(0)
    return torch.stack([even[0], odd[0], even[1], odd[1]])


@lru_cache(256)
def make_philox_round_keys(key: int, device: torch.device | str) -> Tensor:
    """The keys of all rounds, then the multipliers, (rounds + 1, 2, 1); key: below 2^128."""
    halves = (key & _ALL_BITS, key >> 64)
    rows = [
        [half + step * i for half, step in zip(halves, _KEY_STEPS, strict=True)]
        for i in range(NUM_PHILOX_ROUNDS)
    ]
    rows.append(list(_MULTIPLIERS))
    signed = [[(value + 2**63) % 2**64 - 2**63 for value in row] for row in rows]
    return send(torch.tensor(signed)[:, :, None], device)


def normal_from_philox_words(words: Tensor, table: Tensor) -> Tensor:
    """Two standard normal numbers of each word, float32, (B, 2 W), as `make_normal_table` says."""
    tail = words.view(torch.int32).float()
    cell = (tail.view(torch.int32) >> _CELL_SHIFT).bitwise_and_(table.shape[1] - 1).flatten()
    start, slope = (part.index_select(0, cell).view_as(tail) for part in table)
    return tail.mul_(slope).add_(start)


@lru_cache(16)
def make_normal_table(device: torch.device | str) -> Tensor:
    """The normal quantile function, linear in each cell: start and slope, (2, cells).

    Its argument is a signed integer of 32 bits, the distance from the nearer end of [0, 1] in units
    of 2^-32. The first bits of the integer as a float32 name its cell, so that no cell is wider
    than 2^-8 of that distance: inversion by interpolation (Hoermann and Leydold 2003, "Continuous
    random variate generation by fast numerical inversion").
    """
    half = 2 ** (31 - _CELL_SHIFT)  # cells of one sign
    last = 0x4F000000 >> _CELL_SHIFT  # the bits of 2^31
    edges = (torch.arange(last + 2, dtype=torch.int32) << _CELL_SHIFT).view(torch.float32).double()
    quantiles = torch.special.ndtri(edges.clamp(0.25, 2**31) * 2**-32)  # of 0: that of 0.25
    slope = quantiles.diff() / edges.diff()
    start = quantiles[:-1] - slope * edges[:-1]
    start, slope = (F.pad(part, (0, half - len(part))) for part in (start, slope))
    table = torch.stack([torch.cat([start, -start]), torch.cat([slope, slope])])
    return send(table.float(), device)
