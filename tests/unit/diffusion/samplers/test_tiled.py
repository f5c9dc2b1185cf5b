"""A large picture in windows."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm.diffusion.conditioning import Condition
from ldm.diffusion.samplers.tiled import TiledDenoiser, compute_window_starts, make_window_weights


@given(side=st.integers(1, 20), more=st.integers(0, 60), share=st.floats(0, 0.99))
def test_windows_cover_all_and_overlap_enough(side, more, share):
    overlap = int(side * share)
    found = compute_window_starts(side + more, side, overlap)
    assert found[0] == 0
    assert found[-1] == more
    steps = [b - a for a, b in itertools.pairwise(found)]
    assert all(0 < step <= side - overlap for step in steps)
    if steps:
        assert max(steps) - min(steps) <= 1


def test_a_denoiser_of_single_cells_is_not_changed():
    def denoise(x, t, cond):
        return 3 * x + t + cond.concat[:, :3]

    x, concat = torch.randn(2, 3, 21, 13).double(), torch.randn(2, 5, 21, 13).double()
    t, cond = torch.tensor(0.3).double(), Condition(concat=concat)
    torch.testing.assert_close(TiledDenoiser(denoise, 8, 3)(x, t, cond), denoise(x, t, cond))


def test_a_grid_of_one_window_is_not_cut():
    seen = []

    def denoise(x, t, cond):
        seen.append(x.shape)
        return x

    TiledDenoiser(denoise, 8, 2)(torch.zeros(1, 3, 8, 8), torch.tensor(0.5), Condition())
    assert seen == [(1, 3, 8, 8)]


def test_windows_that_disagree_leave_no_edge():
    """Each window answers with a number of its own: the picture goes smoothly between them."""
    answers = iter(range(100))

    def denoise(x, t, cond):
        return torch.full_like(x, float(next(answers) % 2))

    out = TiledDenoiser(denoise, 16, 8)(torch.zeros(1, 1, 16, 64), torch.tensor(0.5), Condition())
    jumps = out.diff(dim=-1).abs().max()
    assert out.min() == 0
    assert out.max() > 0.8
    assert jumps < 0.25  # a hard edge would be 1


def test_weights_are_high_inside_and_never_zero():
    weights = make_window_weights(8, 3)
    assert torch.equal(weights, weights.flip(0))
    assert weights.min() > 0
    assert weights[3] == weights[4] == 1


def test_windows_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="cannot overlap by 8"):
        TiledDenoiser(lambda x, t, cond: x, 8, 8)
    with pytest.raises(ValueError, match="4 cells is smaller than a window of 8"):
        TiledDenoiser(lambda x, t, cond: x, 8, 2)(
            torch.zeros(1, 1, 4, 9), torch.tensor(0.5), Condition()
        )
