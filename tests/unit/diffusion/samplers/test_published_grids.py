"""Whole sampling processes of diffusers, in float64: the same noise, the same latents."""

from dataclasses import replace

import diffusers
import pytest
import torch
from oracle import (
    KINDS,
    assert_close,
    draw_noise,
    import_sde_scheduler,
    in_double,
    sample_ours,
    sample_theirs,
    start,
)

from ldm.diffusion.samplers.ddim import ConsistencySampler, DDIMSampler
from ldm.diffusion.samplers.dpm_sde import DPMSolverSDESampler
from ldm.diffusion.samplers.edm import EDMSampler
from ldm.diffusion.samplers.multistep import DPMSolverSampler, UniPCSampler
from ldm.diffusion.samplers.pndm import PNDMSampler
from ldm.diffusion.samplers.spacing import space_timesteps
from ldm.diffusion.schedules import FlowSchedule, cosine, linear, scaled_linear

TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SD = {**TABLE, "timestep_spacing": "leading", "steps_offset": 1}


@pytest.fixture(autouse=True)
def double_precision():
    """Whole timesteps become float64 in divisions."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


EULER = diffusers.EulerDiscreteScheduler
DPM, UNIPC = diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler
OFFSET = {"spacing": "leading", "offset": 1}
KARRAS = {"use_karras_sigmas": True}
EULER_KARRAS = {"grid": "euler", "spacing": "karras"}
CASES = {
    "ddim": (
        diffusers.DDIMScheduler,
        {**SD, "clip_sample": False, "set_alpha_to_one": False},
        DDIMSampler(**OFFSET, set_alpha_to_one=False),
    ),
    "ddim, alpha 1": (diffusers.DDIMScheduler, {**SD, "clip_sample": False}, DDIMSampler(**OFFSET)),
    "pndm": (
        diffusers.PNDMScheduler,
        {**SD, "skip_prk_steps": True},
        PNDMSampler(**OFFSET, set_alpha_to_one=False),
    ),
    "pndm, no offset": (
        diffusers.PNDMScheduler,
        {**TABLE, "skip_prk_steps": True},
        PNDMSampler(spacing="leading", set_alpha_to_one=False),
    ),
    "euler": (EULER, SD, EDMSampler(order=1, grid="euler", **OFFSET)),
    "euler, trailing": (
        EULER,
        {**TABLE, "timestep_spacing": "trailing"},
        EDMSampler(order=1, grid="euler"),
    ),
    "euler, linspace": (EULER, TABLE, EDMSampler(order=1, grid="euler", spacing="linspace")),
    "euler, karras, leading": (
        EULER,
        {**SD, **KARRAS},
        EDMSampler(order=1, **EULER_KARRAS, ends="leading", offset=1),
    ),
    "euler, karras": (EULER, {**TABLE, **KARRAS}, EDMSampler(order=1, **EULER_KARRAS)),
    "euler, exponential": (
        EULER,
        {**TABLE, "use_exponential_sigmas": True},
        EDMSampler(order=1, grid="euler", spacing="logsnr"),
    ),
    "heun": (diffusers.HeunDiscreteScheduler, SD, EDMSampler(slope="edm", grid="euler", **OFFSET)),
    "heun, linspace": (
        diffusers.HeunDiscreteScheduler,
        TABLE,
        EDMSampler(slope="edm", grid="euler", spacing="linspace"),
    ),
    "heun, karras": (
        diffusers.HeunDiscreteScheduler,
        {**TABLE, **KARRAS},
        EDMSampler(slope="edm", **EULER_KARRAS),
    ),
    "dpmpp_2m": (DPM, SD, DPMSolverSampler(grid="dpm", **OFFSET)),
    "dpmpp_2m, linspace": (DPM, TABLE, DPMSolverSampler(grid="dpm", spacing="linspace")),
    "dpmpp_2m, trailing": (DPM, {**TABLE, "timestep_spacing": "trailing"}, DPMSolverSampler()),
    "dpmpp_2m, karras": (DPM, {**SD, **KARRAS}, DPMSolverSampler(grid="dpm", spacing="karras")),
    "dpmpp_2m, lu": (
        DPM,
        {**TABLE, "use_lu_lambdas": True},
        DPMSolverSampler(grid="dpm", spacing="logsnr"),
    ),
    "dpmpp_2m, last sigma": (
        DPM,
        {**SD, "final_sigmas_type": "sigma_min", "euler_at_final": True},
        DPMSolverSampler(grid="dpm", **OFFSET, set_alpha_to_one=False),
    ),
    "ddim by dpm": (
        DPM,
        {**TABLE, "timestep_spacing": "trailing", "solver_order": 1},
        DDIMSampler(),
    ),
    "unipc": (UNIPC, SD, UniPCSampler(order=2, grid="dpm", **OFFSET)),
    "unipc, linspace": (
        UNIPC,
        {**TABLE, "solver_order": 3},
        UniPCSampler(grid="dpm", spacing="linspace"),
    ),
    "unipc, karras": (
        UNIPC,
        {**TABLE, **KARRAS},
        UniPCSampler(order=2, grid="dpm", spacing="karras"),
    ),
    "unipc, last sigma": (
        UNIPC,
        {**SD, "final_sigmas_type": "sigma_min"},
        UniPCSampler(order=2, grid="dpm", **OFFSET, set_alpha_to_one=False),
    ),
}


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("case", CASES)
def test_the_latents_are_those_of_diffusers(case, kind, monkeypatch):
    cls, config, sampler = CASES[case]
    in_double(monkeypatch, cls)
    scheduler = cls(**config, prediction_type=KINDS[kind])
    if case.startswith("pndm"):
        sampler = replace(sampler, average=kind)
    # Theirs starts a linspace of one step at the cleanest timestep.
    for steps in (2, 10, 30) if "linspace" in (sampler.spacing, sampler.ends) else (1, 2, 10, 30):
        their = sample_theirs(scheduler, steps)
        assert_close(sample_ours(sampler, scaled_linear(), kind, steps), their)


ZERO_SNR = {**TABLE, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.mark.parametrize(
    ("cls", "more", "sampler"),
    [
        (EULER, {}, EDMSampler(order=1, grid="euler")),
        (DPM, {}, DPMSolverSampler(grid="dpm")),
        (UNIPC, {}, UniPCSampler(order=2, grid="dpm")),
        (diffusers.DDIMScheduler, {"clip_sample": False}, DDIMSampler()),
    ],
    ids=["euler", "dpm", "unipc", "ddim"],
)
def test_zero_terminal_snr_begins_where_diffusers_begins(cls, more, sampler, monkeypatch):
    # At alpha^2 = 2^-24, but for DDIM, which steps from pure noise.
    in_double(monkeypatch, cls)
    schedule = scaled_linear(zero_terminal_snr=True)
    scheduler = cls(**ZERO_SNR, **more, prediction_type="v_prediction")
    for steps in (10, 20):
        assert_close(sample_ours(sampler, schedule, "v", steps), sample_theirs(scheduler, steps))


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_flow_matching_is_that_of_diffusers(shift, monkeypatch):
    in_double(monkeypatch, diffusers.FlowMatchEulerDiscreteScheduler)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    sampler = EDMSampler(order=1, grid="euler", spacing="linspace")
    for steps in (2, 10, 30):
        their = sample_theirs(scheduler, steps)
        assert_close(sample_ours(sampler, FlowSchedule(shift=shift), "flow", steps), their)


RANDOM = {
    "ddpm": (diffusers.DDPMScheduler, {**SD, "clip_sample": False}, DDIMSampler(eta=1.0, **OFFSET)),
    "euler_ancestral": (
        diffusers.EulerAncestralDiscreteScheduler,
        {**TABLE, "timestep_spacing": "trailing"},
        DDIMSampler(eta=1.0, grid="euler"),
    ),
    "dpmpp_2m_sde": (
        DPM,
        {**SD, **KARRAS, "algorithm_type": "sde-dpmsolver++"},
        DPMSolverSampler(eta=1.0, grid="dpm", spacing="karras"),
    ),
    "lcm": (diffusers.LCMScheduler, TABLE, ConsistencySampler(timestep_scaling=10.0)),
}


@pytest.mark.parametrize("case", RANDOM)
def test_with_the_same_fresh_noise_the_latents_are_those_of_diffusers(case, monkeypatch):
    cls, config, sampler = RANDOM[case]
    in_double(monkeypatch, cls)
    scheduler = cls(**config)
    for steps in (4, 30):
        their = sample_theirs(scheduler, steps, generator=torch.Generator().manual_seed(5))
        mine = sample_ours(sampler, scaled_linear(), "eps", steps, noise=draw_noise())
        assert_close(mine, their)


SDE_CASES = {
    "leading": (SD, OFFSET),
    "linspace": (TABLE, {"spacing": "linspace"}),
    "trailing": ({**TABLE, "timestep_spacing": "trailing"}, {}),
    "karras": ({**TABLE, "use_karras_sigmas": True}, {"spacing": "karras"}),
}


@pytest.mark.parametrize(
    ("case", "kind", "noisy"),
    [("leading", "v", False), *((case, "eps", True) for case in SDE_CASES)],
)
def test_dpmpp_sde_is_that_of_diffusers_but_for_the_numbers_of_its_noise(
    case, kind, noisy, monkeypatch
):
    """A Brownian motion over sigma, here of two numbers a step, drives theirs too."""
    cls = import_sde_scheduler(monkeypatch)
    in_double(monkeypatch, cls)
    config, settings = SDE_CASES[case]
    scheduler = cls(**config, prediction_type=KINDS[kind])
    sampler = DPMSolverSDESampler(grid="euler", **settings)
    # In the midpoints of linspace they tell the network a time by log(sigma), here by sigma.
    tolerance = 1e-4 if case == "linspace" else 1e-9
    for steps in (2, 10):
        draw, ends = draw_noise(), {}

        def brownian(sigma, sigma_next, draw=draw, ends=ends):
            sigma, sigma_next = float(sigma), float(sigma_next)
            if sigma not in ends:  # to the middle, and from there to the end
                whole = sigma_next**2 / sigma
                first, second = draw(start()), draw(start())
                first = first * (sigma - sigma_next) ** 0.5
                second = second * (sigma_next - whole) ** 0.5
                ends[sigma] = first + second
                return first / (sigma - sigma_next) ** 0.5
            return ends[sigma] / (sigma - sigma_next) ** 0.5

        told = {"noise_sampler": brownian, "s_noise": float(noisy)}
        their = sample_theirs(scheduler, steps, **told)
        noise = draw_noise()
        mine = sample_ours(
            sampler, scaled_linear(), kind, steps, noise=lambda x, n=noise: noisy * n(x)
        )
        assert_close(mine, their, tolerance)


@pytest.mark.parametrize("n", [10, 30, 50])
def test_the_published_grid_starts_where_that_of_stable_diffusion_starts(n):
    schedule = scaled_linear()
    times = space_timesteps(schedule, n, spacing="leading", offset=1, set_alpha_to_one=False)
    assert schedule.timestep(times).round().tolist() == [
        *range((n - 1) * (1000 // n) + 1, 0, -(1000 // n)),
        0,
    ]
    assert n != 30 or schedule.timestep(times)[0].round() == 957 + 1  # stride 33, and the offset


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("make", [cosine, scaled_linear])
def test_whole_timesteps_stay_to_the_last_bit(make, spacing):
    schedule = make()
    for steps in (1, 7, 10, 30, 50):
        times = space_timesteps(schedule, steps, spacing=spacing, grid="dpm")
        assert torch.equal(times, schedule.on_grid(times)), steps


@pytest.mark.parametrize(("n", "strength"), [(30, 0.7), (30, 0.75), (50, 0.33)])
def test_img2img_has_the_times_of_diffusers_by_its_own_steps_and_strength(n, strength):
    """docs/img2img.md: theirs takes int(n * strength) of n steps, ours all that it is given."""
    taken = int(n * strength)
    for cls, grid, more in ((diffusers.DDIMScheduler, None, 0), (DPM, "dpm", 1)):
        scheduler = cls(**SD)
        scheduler.set_timesteps(n)
        stride = 1000 // (n + more)
        times = space_timesteps(
            scaled_linear(),
            taken,
            start=(taken + more) * stride / 1000,
            spacing="leading",
            offset=1,
            grid=grid,
        )
        mine = scaled_linear().timestep(times[:-1]).round().long()
        assert torch.equal(mine, scheduler.timesteps[n - taken :])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"offset": 1}, "sampler.offset=1 moves the times of sampler.spacing=leading alone"),
        ({"offset": 1, "spacing": "karras"}, "leading alone"),
        ({"offset": -1, "spacing": "leading"}, "0 or more"),
        ({"offset": 0.5, "spacing": "leading"}, "number of training timesteps"),
        ({"grid": "heun"}, "none of ddim, euler, dpm"),
        ({"grid": "ddim", "spacing": "karras"}, "no spacing=karras"),
        ({"grid": "dpm", "spacing": "ays"}, "no spacing=ays"),
        ({"ends": "karras"}, "none of trailing"),
        ({"ends": "leading"}, "read with sampler.grid=euler"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_by_name(settings, told):
    for make in (DDIMSampler, PNDMSampler, DPMSolverSDESampler):
        with pytest.raises(ValueError, match=told):
            make(**settings)


def test_an_offset_beyond_the_schedule_is_refused():
    with pytest.raises(
        ValueError, match=r"sampler.offset=1 moves the first of 1000 sampling steps"
    ):
        space_timesteps(linear(), 1000, spacing="leading", offset=1)
    assert len(space_timesteps(linear(), 1000, spacing="leading")) == 1001
    with pytest.raises(ValueError, match="steps=999 or fewer"):
        space_timesteps(linear(), 1000, spacing="leading", grid="dpm")
    with pytest.raises(ValueError, match="set_alpha_to_one=true"):
        ConsistencySampler(set_alpha_to_one=False)
    with pytest.raises(ValueError, match="is for sampler=ddim"):
        DPMSolverSampler(grid="ddim")
    with pytest.raises(ValueError, match="none of eps, v"):
        PNDMSampler(average="x0")
    with pytest.raises(ValueError, match="spacing=ays has none"):
        PNDMSampler(spacing="ays")
