"""What is said of a sampler: its excess is what its samples have, and the defaults have none."""

import pytest
import torch

from ldm.diffusion.samplers.ddim import DDIMSampler
from ldm.diffusion.samplers.edm import EDMSampler
from ldm.diffusion.samplers.multistep import DPMSolverSampler, UniPCSampler
from ldm.diffusion.samplers.overshoot import DATA_STD, format_overshoot_warning, measure_overshoot
from ldm.diffusion.schedules import FlowSchedule, cosine, linear


@pytest.mark.parametrize(
    "sampler",
    [
        DPMSolverSampler(eta=1.0, spacing="leading"),
        DPMSolverSampler(order=3, spacing="karras"),
        EDMSampler(churn=5.0, spacing="leading"),
        DDIMSampler(eta=0.5),
    ],
)
def test_the_overshoot_is_that_of_samples(sampler):
    schedule, n, generator = linear(), 40_000, torch.Generator().manual_seed(0)

    def denoise(x_t, t):
        alpha, sigma = schedule(t)
        return alpha * DATA_STD**2 / (alpha**2 * DATA_STD**2 + sigma**2) * x_t

    def noise(x):
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)

    x = noise(torch.empty(n, 1, 1, 1).double())
    x0 = sampler(denoise, x, schedule, sampler.timesteps(schedule, 12), noise=noise)
    assert measure_overshoot(sampler, schedule, 12) == pytest.approx(
        x0.std().item() / DATA_STD, rel=0.02
    )


@pytest.mark.parametrize(
    "schedule", [linear(), cosine(), FlowSchedule()], ids=["linear", "cosine", "flow"]
)
def test_only_overshooting_solvers_warn(schedule):
    sde = DPMSolverSampler(eta=1.0, spacing="leading")
    for steps in (10, 15, 20, 30):
        assert "overshoots" in format_overshoot_warning(sde, schedule, steps)
        assert "spacing=trailing" in format_overshoot_warning(sde, schedule, steps)
    assert format_overshoot_warning(sde, schedule, 100) is None
    third = DPMSolverSampler(order=3, spacing="karras")
    for steps, said in ((8, True), (10, True), (12, True), (20, False), (30, False)):
        assert bool(format_overshoot_warning(third, schedule, steps)) == said
    for sampler in (
        DDIMSampler(),
        DPMSolverSampler(),
        DPMSolverSampler(eta=1.0),
        DPMSolverSampler(order=3),
        UniPCSampler(),
        EDMSampler(),
    ):
        for steps in (1, 2, 4, 8, 15, 30, 100):
            assert format_overshoot_warning(sampler, schedule, steps) is None


def test_a_picture_that_is_noised_to_a_time_begins_with_its_own_deviation():
    sampler = DDIMSampler(spacing="leading")
    assert measure_overshoot(sampler, linear(), 200, start=0.5) == pytest.approx(1, abs=0.03)
    assert (
        format_overshoot_warning(
            DPMSolverSampler(spacing="leading", clip=1.0, quantile=0.9), FlowSchedule(), 6
        )
        is not None
    )


class WholeStep(DDIMSampler):
    """With a constructor of its own, as a team's class may have."""

    def __init__(self, *, name: str = "") -> None:
        super().__init__(clip=1.0)


def test_a_sampler_with_a_constructor_of_its_own_is_measured():
    sampler = WholeStep(name="mine")
    assert format_overshoot_warning(sampler, cosine(), 12) is None
    assert sampler.clip == 1.0
