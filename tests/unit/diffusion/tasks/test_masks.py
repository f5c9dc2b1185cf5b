"""Masks that inpainting is trained with."""

import torch

from ldm.diffusion.rng import make_generators
from ldm.diffusion.tasks.masks import MASK_KIND_BOUNDS, random_masks


def masks(positions, *, height=32, width=48):
    draws = make_generators(0, positions, stream="task")
    return random_masks(torch.empty(len(positions), 3, height, width), generator=draws)


def test_a_mask_is_of_zeros_and_ones_and_hides_something():
    found = masks(range(400))
    assert found.shape == (400, 1, 32, 48)
    assert set(found.unique().tolist()) == {0.0, 1.0}
    assert found.flatten(1).any(1).all()


def test_one_mask_in_seven_hides_the_whole_image():
    share = masks(range(2000)).flatten(1).mean(1)
    everything = float((share == 1).double().mean())
    assert abs(everything - (1 - MASK_KIND_BOUNDS[-1])) < 0.03
    assert 0.2 < share[share < 1].mean() < 0.5


def test_a_mask_belongs_to_its_image():
    assert torch.equal(masks([3, 9])[1:], masks([9]))


def test_masks_are_rectangles_strokes_and_half_planes():
    """Of a rectangle, rows and columns give the mask; a half-plane and its turn are complements."""
    found = masks(range(300))[:, 0].bool()
    boxes = found.any(2)[:, :, None] & found.any(1)[:, None, :]
    whole = found.flatten(1).all(1)
    rectangles = (found == boxes).flatten(1).all(1) & ~whole
    assert 0.25 < rectangles.double().mean() < 0.45
    corners = found[:, ::31, ::47].flatten(1).sum(1)  # of the four corners of the picture
    halves = (corners == 2) & ~rectangles
    assert 0.1 < halves.double().mean() < 0.35


def test_masks_have_any_size():
    assert masks([0, 1, 2], height=1, width=1).shape == (3, 1, 1, 1)
