import math
from itertools import pairwise

import diffusers
import pytest
import torch
from mixture import agreement, ideal_denoiser
from oracle import (
    KINDS,
    SCHEDULES,
    STEPS,
    assert_same,
    generator,
    in_double,
    network,
    ours,
    start,
    theirs,
)
from test_samplers import sample

from ldm.diffusion.rng import ImageNoise
from ldm.diffusion.samplers.ddim import DDIMSampler
from ldm.diffusion.samplers.edm import EDMSampler
from ldm.diffusion.samplers.spacing import SPACINGS, space_timesteps
from ldm.diffusion.schedules import FlowSchedule, linear

GRIDS = {
    **{name: {"timestep_spacing": name} for name in ("trailing", "leading", "linspace")},
    "karras": {"use_karras_sigmas": True},
}
EULER, HEUN = diffusers.EulerDiscreteScheduler, diffusers.HeunDiscreteScheduler
ANCESTRAL = diffusers.EulerAncestralDiscreteScheduler
CASES = {
    "euler": (EULER, EDMSampler(order=1)),
    "euler_ancestral": (ANCESTRAL, DDIMSampler(eta=1.0)),
    "heun": (HEUN, EDMSampler(slope="edm")),
}


@pytest.mark.parametrize("spacing", GRIDS)
@pytest.mark.parametrize("case", CASES)
def test_rules_are_those_of_diffusers(case, spacing, monkeypatch):
    cls, sampler = CASES[case]
    kinds = {"eps": "linear", "v": "cosine", "x0": "linear"}
    if cls is ANCESTRAL:
        if spacing == "karras":
            pytest.skip("not in diffusers")
        kinds.pop("x0")  # raises NotImplementedError
    in_double(monkeypatch, cls)
    for kind, name in kinds.items():
        schedule, table = SCHEDULES[name]
        scheduler = cls(**table, **GRIDS[spacing], prediction_type=KINDS[kind])
        for steps in STEPS if kind != "x0" else STEPS[:1]:
            noise = {"generator": generator()} if cls is ANCESTRAL else {}
            their = theirs(scheduler, steps, **noise)
            assert_same(ours(sampler, schedule, kind, scheduler), their)


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "ays"])
def test_euler_of_flow_matching_is_that_of_diffusers(spacing, monkeypatch):
    in_double(monkeypatch, diffusers.FlowMatchEulerDiscreteScheduler)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    for steps in STEPS:
        sigmas = space_timesteps(FlowSchedule(), steps, spacing=spacing)[:-1].tolist()
        their = theirs(scheduler, steps, sigmas=sigmas)
        assert_same(ours(EDMSampler(order=1), FlowSchedule(), "flow", scheduler), their)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_heun_of_flow_matching_is_that_of_diffusers(shift, monkeypatch):
    in_double(monkeypatch, diffusers.FlowMatchHeunDiscreteScheduler)
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=shift)
    for steps in STEPS:
        their = theirs(scheduler, steps)
        assert_same(ours(EDMSampler(), FlowSchedule(), "flow", scheduler), their)


def test_euler_is_ddim_and_heun_asks_twice():
    schedule, denoise = FlowSchedule(), ideal_denoiser(FlowSchedule())
    x = start().reshape(-1, 2, 1, 1)
    for spacing in SPACINGS:
        times = space_timesteps(schedule, 6, spacing=spacing)
        euler, ddim = (
            s(denoise, x, schedule, times, noise=None) for s in (EDMSampler(order=1), DDIMSampler())
        )
        assert torch.equal(euler, ddim)
    calls = []
    EDMSampler()(lambda x, t: calls.append(t) or x, x, schedule, times, noise=None)
    assert len(calls) == 2 * 6 - 1


def algorithm_2(denoise, x, schedule, times, *, churn, s_min, s_max, s_noise, order, draw):
    """Karras et al. 2022, algorithm 2, in x / alpha and r = sigma / alpha, as it is printed."""
    r = [schedule.noise_to_signal_ratio(t).item() for t in times]
    n = len(r) - 1

    def ask(y, level):
        t = schedule.timesteps_at_ratio(torch.tensor(level, dtype=torch.float64))
        return denoise(schedule(t)[0] * y, t)

    y = x / schedule(times[0])[0]
    for i, (now, then) in enumerate(pairwise(r)):
        gamma = min(churn / n, math.sqrt(2) - 1) if s_min <= now <= s_max else 0.0
        high = now * (1 + gamma)
        if gamma:
            y = y + math.sqrt(high**2 - now**2) * s_noise * draw(y)
        slope = (y - ask(y, high)) / high
        after = y + (then - high) * slope
        if order == 2 and i < n - 1:
            again = (after - ask(after, then)) / then
            after = y + (then - high) * (slope + again) / 2
        y = after
    return y


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("schedule", [linear(), FlowSchedule()])
def test_churn_is_algorithm_2(schedule, order):
    times = space_timesteps(schedule, 9, start=0.9)
    settings = {"churn": 3.0, "s_min": 0.05, "s_max": 2.0, "s_noise": 1.01, "order": order}

    def denoise(x_t, t):
        return network(x_t, 1000 * t)

    g = generator()

    def draw(x):
        return torch.randn(x.shape, generator=g, dtype=x.dtype)

    expected = algorithm_2(denoise, start(), schedule, times, **settings, draw=draw)
    sampler = EDMSampler(
        order=order, slope="edm", churn=3.0, churn_min=0.05, churn_max=2.0, churn_noise=1.01
    )
    g = generator()
    result = sampler(denoise, start(), schedule, times, noise=draw)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
    quiet = EDMSampler(order=order, slope="edm")(denoise, start(), schedule, times, noise=draw)
    assert (quiet - result).abs().max() > 1e-2


def test_churn_reaches_the_mixture_where_that_of_diffusers_does_not():
    """Theirs adds the noise after the network has been asked (EulerDiscreteScheduler.step)."""
    schedule, steps = linear(), 60
    assert agreement(sample(EDMSampler(churn=30.0), schedule, steps=steps)) > 0.01
    assert agreement(sample(EDMSampler(churn=30.0, churn_noise=1.3), schedule, steps=steps)) < 1e-4
    table = SCHEDULES["linear"][1]
    theirs = EULER(**table, prediction_type="sample", timestep_spacing="trailing")
    for churn, right in ((0.0, True), (30.0, False)):
        theirs.set_timesteps(steps)
        denoise, g = ideal_denoiser(schedule), generator()
        x = torch.randn(4000, 2, 1, 1, generator=torch.Generator().manual_seed(3))
        x = x.double() * theirs.init_noise_sigma
        for k in theirs.timesteps:
            x_t = theirs.scale_model_input(x, k)
            out = denoise(x_t, (k + 1).double() / 1000)
            x = theirs.step(out, k, x, s_churn=churn, generator=g).prev_sample
        assert (agreement(x) > 0.01) == right


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"order": 3}, "none of 1"), ({"slope": "t"}, "none of flow"), ({"churn": -1.0}, "0 or more")],
)
def test_impossible_settings_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        EDMSampler(**settings)


def test_churn_draws_for_an_image_alone():
    schedule, x = FlowSchedule(), start()[:, :2]

    def run(part, seeds):
        times = space_timesteps(schedule, 6)
        return EDMSampler(churn=4.0)(
            lambda x, t: x.tanh(), x[part], schedule, times, noise=ImageNoise(seeds)
        )

    both = run(slice(0, 2), [1, 2])
    assert torch.equal(both[1:], run(slice(1, 2), [2]))
