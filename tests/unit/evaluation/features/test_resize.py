"""Shapes: H W pixels, S the side of the result."""

import numpy as np
import pytest
import torch
from PIL import Image
from real_pictures import coco, emoji
from torch import Tensor

from ldm.evaluation.features.base import resize_for_network

NEAR = 0.02  # grey levels; measured: 0.0062 at worst


def clean_fid(picture: Tensor, size: int) -> Tensor:
    """The reference: each channel by itself, in Pillow's 32-bit float mode, then clipped."""
    rows = [Image.fromarray(channel.numpy().astype(np.float32)) for channel in picture]
    assert all(row.mode == "F" for row in rows)
    rows = [np.asarray(row.resize((size, size), Image.Resampling.BICUBIC)) for row in rows]
    return torch.from_numpy(np.stack(rows).clip(0, 255))


def noise() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(64, 64), (256, 256), (33, 57), (1, 1), (300, 298), (1024, 700), (5, 900)]
    return [torch.randint(0, 256, (3, *side), dtype=torch.uint8, generator=draw) for side in shapes]


PICTURES = {"emoji": lambda: emoji(12), "photographs": lambda: coco(8), "noise": noise}


@pytest.mark.parametrize("size", [32, 224, 299])
@pytest.mark.parametrize("kind", PICTURES)
def test_it_is_pillows_resize_of_floats_up_and_down(kind, size):
    for picture in PICTURES[kind]():
        expected, got = clean_fid(picture, size), resize_for_network(picture[None], size)[0]
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=0, atol=NEAR)


def test_values_are_clipped_but_not_rounded():
    stripes = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    stripes[..., ::2] = 255
    for size in (48, 299):
        got = resize_for_network(stripes, size)
        assert got.min() >= 0
        assert got.max() <= 255
        assert (got != got.round()).float().mean() > 0.5


def test_a_picture_of_the_right_size_comes_back_as_it_is():
    picture = noise()[1][None]
    assert torch.equal(resize_for_network(picture, 256), picture.float())


def test_no_picture_depends_on_its_batch():
    pictures = torch.stack(noise()[1:2] + [noise()[1].flip(1)] * 4)
    alone = torch.cat([resize_for_network(picture[None], 99) for picture in pictures])
    assert torch.equal(resize_for_network(pictures, 99), alone)
