"""What is said of a sampler: its excess is what its samples have, and the defaults have none."""

import pytest
import torch

from ldm.diffusion.samplers.base import DDIM
from ldm.diffusion.samplers.edm import EDM
from ldm.diffusion.samplers.multistep import DPMSolver, UniPC
from ldm.diffusion.samplers.overshoot import STD, caveat, excess
from ldm.diffusion.schedules import Flow, cosine, linear


@pytest.mark.parametrize(
    "sampler",
    [
        DPMSolver(eta=1.0, spacing="leading"),
        DPMSolver(order=3, spacing="karras"),
        EDM(churn=5.0, spacing="leading"),
        DDIM(eta=0.5),
    ],
)
def test_the_excess_is_that_of_samples(sampler):
    schedule, n, generator = linear(), 40_000, torch.Generator().manual_seed(0)

    def denoise(x_t, t):
        alpha, sigma = schedule(t)
        return alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * x_t

    def noise(x):
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)

    x = noise(torch.empty(n, 1, 1, 1).double())
    x0 = sampler(denoise, x, schedule, sampler.times(schedule, 12), noise=noise)
    assert excess(sampler, schedule, 12) == pytest.approx(x0.std().item() / STD, rel=0.02)


@pytest.mark.parametrize("schedule", [linear(), cosine(), Flow()], ids=["linear", "cosine", "flow"])
def test_a_word_where_a_solver_overshoots_and_none_elsewhere(schedule):
    sde = DPMSolver(eta=1.0, spacing="leading")
    for steps in (10, 15, 20, 30):
        assert "overshoots" in caveat(sde, schedule, steps)
        assert "spacing=trailing" in caveat(sde, schedule, steps)
    assert caveat(sde, schedule, 100) is None
    third = DPMSolver(order=3, spacing="karras")
    for steps, said in ((8, True), (10, True), (12, True), (20, False), (30, False)):
        assert bool(caveat(third, schedule, steps)) == said
    for sampler in (DDIM(), DPMSolver(), DPMSolver(eta=1.0), DPMSolver(order=3), UniPC(), EDM()):
        for steps in (1, 2, 4, 8, 15, 30, 100):
            assert caveat(sampler, schedule, steps) is None


def test_a_picture_that_is_noised_to_a_time_begins_with_its_own_deviation():
    sampler = DDIM(spacing="leading")
    assert excess(sampler, linear(), 200, start=0.5) == pytest.approx(1, abs=0.03)
    assert caveat(DPMSolver(spacing="leading", clip=1.0, quantile=0.9), Flow(), 6) is not None
