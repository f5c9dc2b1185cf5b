"""Philox 4x64-10 against its authors' vectors and NumPy, and normal numbers from its words."""

import numpy as np
import pytest
import torch

from ldm.diffusion.philox import (
    compute_philox_words,
    draw_philox_words,
    make_normal_table,
    make_philox_round_keys,
    normal_from_philox_words,
    philox_4x64,
)

FULL = 2**64 - 1
PI = [0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89]
PI_KEY = [0x452821E638D01377, 0xBE5466CF34E90C6C]
# Random123's tests/kat_vectors: counter, key, words.
KNOWN = [
    ([0] * 4, [0] * 2, "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
    ([FULL] * 4, [FULL] * 2, "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"),
    (PI, PI_KEY, "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6"),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_words_are_those_of_random123(counter, key, expected):
    signed = [[(word + 2**63) % 2**64 - 2**63] for word in counter]
    keys = make_philox_round_keys(key[0] | key[1] << 64, "cpu")
    words = philox_4x64(torch.tensor(signed), keys)[:, 0].tolist()
    assert [word % 2**64 for word in words] == [int(word, 16) for word in expected.split()]


@pytest.mark.parametrize(
    "positions",
    [[5, 6, 7, 8], [9, 3, 4, 4], [2**32 - 2, 2**32 - 1, 2**32, 2**32 + 1], [2**63 - 1, 0, 2**62]],
)
@pytest.mark.parametrize("words", [1, 4, 13])
def test_the_host_and_tensors_give_the_same_words(positions, words):
    key = 0xBE5466CF34E90C6C452821E638D01377
    host = draw_philox_words(positions, words, key=key, draw=3)
    tensors = compute_philox_words(
        torch.tensor(positions), words, round_keys=make_philox_round_keys(key, "cpu"), draw=3
    )
    assert torch.equal(host, tensors)
    assert tensors.is_contiguous()
    assert host.shape == (len(positions), -(-words // 4) * 4)
    for i, position in enumerate(positions):
        assert torch.equal(draw_philox_words([position], words, key=key, draw=3)[0], host[i])


def test_a_position_has_the_words_of_numpy_at_its_counter():
    words = draw_philox_words([7], 8, key=11, draw=2)[0].tolist()
    theirs = np.random.Philox(key=11, counter=7 * 2 + (2 << 128) + (2 << 192)).random_raw(8)
    assert [word % 2**64 for word in words] == theirs.tolist()


def test_images_of_different_sizes_share_no_words():
    sizes = [draw_philox_words(range(20), words, key=5) for words in (4, 8, 16)]
    assert torch.cat([words.flatten() for words in sizes]).unique().numel() == 20 * (4 + 8 + 16)


def test_no_two_counters_of_a_key_are_equal():
    """Within a draw, where an image has more words than another, and from draw to draw."""
    drawn = [draw_philox_words(range(2**32 - 50, 2**32 + 50), 40, key=5, draw=i) for i in range(3)]
    assert torch.cat(drawn).unique().numel() == 3 * 100 * 40


def test_normal_numbers_are_the_quantiles_of_their_words():
    """Up to the tails: a share u of all numbers is below z with an error of 4e-6 u at most."""
    table = make_normal_table("cpu")
    tail = torch.logspace(0, 31, 200_000, base=2, dtype=torch.float64).clamp(max=2**31 - 1).int()
    for sign in (1, -1):
        z = normal_from_philox_words((sign * tail).view(torch.int64)[None], table)[0].double()
        u = tail.double() * 2**-32
        assert (sign * z <= 0).all()
        assert (torch.special.ndtr(sign * z) / u - 1).abs().max() < 5e-6
    ends = torch.tensor([0, -(2**31)], dtype=torch.int32).view(torch.int64)[None]
    assert normal_from_philox_words(ends, table)[0].tolist() == pytest.approx(
        [-6.4439, 0], abs=1e-4
    )
