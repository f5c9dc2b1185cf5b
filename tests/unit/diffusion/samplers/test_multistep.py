import math
from itertools import pairwise

import diffusers
import pytest
import torch
from oracle import KINDS, SCHEDULES, STEPS, assert_same, generator, in_double, ours, theirs

from ldm.diffusion.samplers.ddim import DDIMSampler
from ldm.diffusion.samplers.multistep import DPMSolverSampler, UniPCSampler, quadrature_weights

GRIDS = {
    **{name: {"timestep_spacing": name} for name in ("trailing", "leading", "linspace")},
    "karras": {"use_karras_sigmas": True},
    **{f"flow, shift {s}": {"flow_shift": s} for s in (0.5, 1.0, 3.0)},
}


class WholeLastTerm(diffusers.DPMSolverMultistepScheduler):
    """Their order 3 with the other half of its last term, and order 2 in the last step but one.

    They take order 3 there where steps are 15 or more, which is worse on even grids.
    """

    def multistep_dpm_solver_third_order_update(self, outputs, *, sample, noise=None):
        i = self.step_index
        if i == len(self.timesteps) - 2:
            return self.multistep_dpm_solver_second_order_update(outputs, sample=sample)
        half = super().multistep_dpm_solver_third_order_update(outputs, sample=sample)
        levels = [self._sigma_to_alpha_sigma_t(self.sigmas[j]) for j in (i + 1, i, i - 1, i - 2)]
        ends = [math.log(alpha / sigma) for alpha, sigma in levels]
        h, *before = (a - b for a, b in pairwise(ends))
        r0, r1 = (part / h for part in before)
        m2, m1, m0 = outputs
        second = ((m0 - m1) / r0 - (m1 - m2) / r1) / (r0 + r1)
        return half - levels[0][0] * ((math.expm1(-h) + h) / h**2 - 0.5) * second


CASES = {
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}, DPMSolverSampler()),
    "dpmpp_2m_sde": (
        diffusers.DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++"},
        DPMSolverSampler(eta=1.0),
    ),
    "dpmpp_3m": (WholeLastTerm, {"solver_order": 3}, DPMSolverSampler(order=3)),
    "unipc_2": (diffusers.UniPCMultistepScheduler, {"solver_order": 2}, UniPCSampler(order=2)),
    "unipc": (diffusers.UniPCMultistepScheduler, {"solver_order": 3}, UniPCSampler()),
}


@pytest.mark.parametrize("spacing", GRIDS)
@pytest.mark.parametrize("case", CASES)
def test_solvers_are_those_of_diffusers(case, spacing, monkeypatch):
    cls, options, sampler = CASES[case]
    in_double(monkeypatch, cls, diffusers.DPMSolverMultistepScheduler)
    kinds = {"eps": "linear", "v": "cosine", "x0": "linear"}
    if spacing.startswith("flow"):
        kinds = {"flow": "flow"}
    if spacing == "karras":
        # On cosine they round many times to one and lose count (diffusers issue 12771).
        kinds["v"] = "scaled_linear"
    for kind, name in kinds.items():
        schedule, table = SCHEDULES[name]
        scheduler = cls(**table, **options, **GRIDS[spacing], prediction_type=KINDS[kind])
        for steps in STEPS if kind != "x0" else STEPS[:1]:
            noise = {"generator": generator()} if sampler_draws(sampler) else {}
            their = theirs(scheduler, steps, **noise)
            assert_same(ours(sampler, schedule, kind, scheduler), their)


def sampler_draws(sampler):
    return getattr(sampler, "eta", 0) > 0


def test_order_one_is_ddim_bit_for_bit():
    schedule, _ = SCHEDULES["flow"]
    x = torch.randn(2, 3, 4, 4, generator=generator())
    for eta in (0.0, 1.0):
        results = []
        for sampler in (DPMSolverSampler(order=1, eta=eta), DDIMSampler(eta=eta)):
            noise = generator()
            times = sampler.timesteps(schedule, 8)
            results.append(
                sampler(
                    lambda x, t: (x * t).sin().float(),
                    x,
                    schedule,
                    times,
                    noise=lambda x, g=noise: torch.randn(x.shape, generator=g),
                )
            )
        assert torch.equal(*results)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("h", [0.01, 0.7, 5.0])
def test_weights_average_polynomials_exactly(h, eta):
    """Against quadrature of the integral that the update rule stands for."""
    now, then = (math.exp(-h), 1.0), (1.0, 1.0)  # log(alpha / sigma) rises by h
    up = eta * math.sqrt(-math.expm1(-2 * h))
    decay = h - 0.5 * math.log1p(-(up**2))
    places = [-1.3, -0.4, 0.0]
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    counts = (decay * u).exp()
    for power in range(3):
        mean = (counts * u**power).sum() / counts.sum()
        shares = quadrature_weights(places, now, then, up=up)
        assert sum(w * p**power for w, p in zip(shares, places, strict=True)) == pytest.approx(
            mean.item(), rel=1e-6, abs=1e-9
        )


@pytest.mark.parametrize("make", [DPMSolverSampler, UniPCSampler])
@pytest.mark.parametrize("order", [0, 4, 2.5])
def test_other_orders_are_refused(make, order):
    with pytest.raises(ValueError, match="none of 1, 2, 3"):
        make(order=order)
