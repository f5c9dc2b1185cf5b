import math

import pytest
import torch
from scipy.special import pseudo_huber

from ldm.diffusion.losses import PseudoHuberLoss, SquaredLoss
from ldm.diffusion.schedules import linear

T = torch.tensor([1e-3, 0.2, 0.5, 1.0], dtype=torch.float64)
LOG_SNR = linear().log_snr(T)


def error(scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(4, 2, 3, 3, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("c", [0.01, 0.3, 5.0])
def test_pseudo_huber_matches_scipy(c):
    ours = PseudoHuberLoss(c)(error(), T, LOG_SNR)
    expected = torch.from_numpy(2 * pseudo_huber(c, error().numpy()))  # ours has the slope of x^2
    torch.testing.assert_close(ours, expected)


def test_small_errors_are_squared_and_large_ones_are_not():
    small, large = error(1e-6), error(1e6)
    squares = SquaredLoss()(small, T, LOG_SNR)
    assert torch.equal(squares, small**2)
    torch.testing.assert_close(PseudoHuberLoss(1.0)(small, T, LOG_SNR), squares, rtol=1e-9, atol=0)
    in_single = PseudoHuberLoss(1.0)(
        small.float(), T, LOG_SNR
    )  # where the plain formula has only zeros
    torch.testing.assert_close(in_single, squares.float(), rtol=1e-5, atol=0)
    linear_part = PseudoHuberLoss(0.1)(large, T, LOG_SNR)
    torch.testing.assert_close(linear_part, 0.2 * large.abs(), rtol=1e-4, atol=0)


def test_c_follows_its_schedule():
    log_snr = torch.cat([LOG_SNR, torch.tensor([math.inf, -math.inf], dtype=torch.float64)])
    t = torch.cat([T, torch.tensor([0.0, 1.0], dtype=torch.float64)])
    assert (PseudoHuberLoss(0.1).c_at(t, log_snr) == 0.1).all()
    exponential = PseudoHuberLoss(0.1, schedule="exponential").c_at(t, log_snr)
    torch.testing.assert_close(exponential, (math.log(0.1) * t).exp())
    snr = PseudoHuberLoss(0.1, schedule="snr").c_at(t, log_snr)
    alpha, sigma = linear()(T)
    torch.testing.assert_close(snr[:4], 0.9 / (1 + sigma / alpha) ** 2 + 0.1)
    assert snr[4:].tolist() == [1.0, 0.1]


def test_gradients_are_finite_at_no_error():
    zero = torch.zeros(4, 1, 1, 1, requires_grad=True)
    PseudoHuberLoss(0.1, schedule="snr")(zero, T, LOG_SNR).sum().backward()
    assert (zero.grad == 0).all()


def test_impossible_options_are_refused():
    for c in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"loss\.c must be above 0"):
            PseudoHuberLoss(c)
    with pytest.raises(ValueError, match="at most 1"):
        PseudoHuberLoss(2.0, schedule="snr")
    PseudoHuberLoss(2.0)
    with pytest.raises(ValueError, match="none of constant, exponential, snr"):
        PseudoHuberLoss(schedule="linear")
