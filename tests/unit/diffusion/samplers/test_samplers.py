import math
from itertools import pairwise
from pathlib import Path

import diffusers
import pytest
import torch
from hydra.utils import instantiate
from mixture import agreement, ideal_denoiser
from omegaconf import OmegaConf
from oracle import KINDS, SCHEDULES, STEPS, assert_same, generator, in_double, ours, start, theirs

from ldm.config.composition import CONF_DIR
from ldm.diffusion.rng import ImageNoise
from ldm.diffusion.samplers.ddim import ConsistencySampler, DDIMSampler
from ldm.diffusion.samplers.edm import EDMSampler
from ldm.diffusion.samplers.multistep import DPMSolverSampler, UniPCSampler
from ldm.diffusion.samplers.spacing import SPACINGS, space_timesteps
from ldm.diffusion.schedules import FlowSchedule, LaplaceSchedule, cosine, linear

OPTIONS = {
    path.stem: OmegaConf.load(path) for path in sorted(Path(CONF_DIR, "sampler").glob("*.yaml"))
}
VARIANTS = {  # what else is worth a look: all that draws, bounds or corrects
    "ddim, half": DDIMSampler(eta=0.5),
    "euler, churn": EDMSampler(order=1, churn=5.0),
    "heun, edm, churn": EDMSampler(slope="edm", churn=5.0),
    "heun, x0": EDMSampler(slope="x0"),
    "dpmpp_3m_sde": DPMSolverSampler(order=3, eta=1.0),
    "unipc 1": UniPCSampler(order=1),
    "lcm, any time": ConsistencySampler(original_steps=None),
    "clipped": UniPCSampler(clip=2.0),
    "dynamic": DPMSolverSampler(eta=1.0, clip=1.0, quantile=0.9),
}
SAMPLERS = {**{name: instantiate(cfg) for name, cfg in OPTIONS.items()}, **VARIANTS}


TABLES = {"eps": "linear", "v": "cosine", "x0": "scaled_linear"}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize(
    ("eta", "spacing"), [(0.0, "trailing"), (0.0, "leading"), (0.5, "trailing"), (1.0, "leading")]
)
def test_ddim_is_that_of_diffusers(kind, eta, spacing, monkeypatch):
    # No linspace: theirs steps from a level to the one 1000 // steps below, wherever it asks next.
    in_double(monkeypatch, diffusers.DDIMScheduler)
    schedule, table = SCHEDULES[TABLES[kind]]
    scheduler = diffusers.DDIMScheduler(
        **table, prediction_type=KINDS[kind], clip_sample=False, timestep_spacing=spacing
    )
    for steps in STEPS:
        their = theirs(scheduler, steps, eta=eta, generator=generator())
        assert_same(ours(DDIMSampler(eta=eta), schedule, kind, scheduler), their)
        own = space_timesteps(schedule, steps, spacing=spacing)[:-1]
        assert torch.equal(schedule.timestep(own).round().long(), scheduler.timesteps)


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_ddpm_is_that_of_diffusers(kind, spacing, monkeypatch):
    in_double(monkeypatch, diffusers.DDPMScheduler)
    schedule, table = SCHEDULES[TABLES[kind]]
    scheduler = diffusers.DDPMScheduler(
        **table, prediction_type=KINDS[kind], clip_sample=False, timestep_spacing=spacing
    )
    for steps in [*STEPS, 1000] if spacing == "trailing" and kind == "eps" else STEPS:
        their = theirs(scheduler, steps, generator=generator())
        assert_same(ours(DDIMSampler(eta=1.0), schedule, kind, scheduler), their)


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_lcm_is_that_of_diffusers(kind, monkeypatch):
    """Without its c_skip and c_out, which belong to the network: with them x0_hat is x at t = 0."""
    in_double(monkeypatch, diffusers.LCMScheduler)
    schedule, table = SCHEDULES["scaled_linear"]
    scheduler = diffusers.LCMScheduler(
        **table, prediction_type=KINDS[kind], timestep_scaling=1e12, clip_sample=False
    )
    for steps in (1, 4, *STEPS):
        their = theirs(scheduler, steps, generator=generator())
        sampler = ConsistencySampler()
        assert_same(ours(sampler, schedule, kind, scheduler), their)
        own = sampler.timesteps(schedule, steps)[:-1]
        assert torch.equal(schedule.timestep(own).round().long(), scheduler.timesteps)


def test_lcm_of_flow_matching_is_that_of_diffusers(monkeypatch):
    in_double(monkeypatch, diffusers.FlowMatchLCMScheduler)
    scheduler = diffusers.FlowMatchLCMScheduler()
    for steps in STEPS:
        sigmas = space_timesteps(FlowSchedule(), steps)[:-1].tolist()
        their = theirs(scheduler, steps, sigmas=sigmas, generator=generator())
        assert_same(ours(ConsistencySampler(), FlowSchedule(), "flow", scheduler), their)


def test_dynamic_thresholding_is_that_of_diffusers(monkeypatch):
    # Their own default of sample_max_value, 1, makes plain clipping of it.
    in_double(monkeypatch, diffusers.DDIMScheduler)
    schedule, table = SCHEDULES["scaled_linear"]
    told = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1e9}
    scheduler = diffusers.DDIMScheduler(**table, **told, timestep_spacing="trailing")
    their = theirs(scheduler, 20, use_clipped_model_output=True)
    sampler = DDIMSampler(clip=1.0, quantile=0.9)
    assert_same(ours(sampler, schedule, "eps", scheduler), their)
    scheduler = diffusers.DDIMScheduler(**table, clip_sample=True, timestep_spacing="trailing")
    their = theirs(scheduler, 20, use_clipped_model_output=True)
    assert_same(ours(DDIMSampler(clip=1.0), schedule, "eps", scheduler), their)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bounds_are_an_images_own(dtype):
    x = torch.stack([torch.linspace(-3, 3, 101), torch.linspace(-0.5, 0.5, 101)]).to(dtype)
    x = x.reshape(2, 1, 1, 101)
    seen = []

    def run(**settings):
        DDIMSampler(**settings)(
            lambda x_t, t: x_t,
            x,
            FlowSchedule(),
            torch.tensor([0.5, 0.0]),
            noise=None,
            on_step=lambda i, x0_hat: seen.append(x0_hat),
        )
        return seen[-1].double()

    cut, scaled = run(clip=1.0), run(clip=1.0, quantile=0.9)
    assert torch.equal(cut, x.double().clamp(-1, 1))
    assert torch.equal(scaled[1], x[1].double()), "what is within its bounds stays as it is"
    torch.testing.assert_close(scaled[0], x[0].double().clamp(-2.7, 2.7) / 2.7, rtol=0, atol=0.02)
    assert seen[-1].dtype == dtype


def sample(sampler, schedule, *, steps, n=4000):
    """n samples of the mixture, and with that as much noise as the sampler asks for."""
    x = torch.randn(n, 2, 1, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    noise, times = ImageNoise([3]), sampler.timesteps(schedule, steps)
    return sampler(ideal_denoiser(schedule), x, schedule, times, noise=lambda x: noise(x[None])[0])


# scaled_linear keeps 7 % of signal at t = 1, so that its prior is not quite N(0, 1).
@pytest.mark.parametrize("schedule", [linear(), FlowSchedule()], ids=["linear", "flow"])
@pytest.mark.parametrize(
    ("sampler", "steps"),
    [
        (DDIMSampler(), 100),
        (DDIMSampler(eta=1.0), 200),
        (DPMSolverSampler(spacing="ays"), 30),
        (DPMSolverSampler(eta=1.0, spacing="ays"), 80),
        (DPMSolverSampler(order=3, eta=0.7, spacing="ays"), 60),
        (UniPCSampler(spacing="ays"), 25),
        (EDMSampler(spacing="ays", churn=20.0), 40),
    ],
    ids=str,
)
def test_samplers_reach_the_mixture(schedule, sampler, steps):
    assert agreement(sample(sampler, schedule, steps=steps)) > 0.01


@pytest.mark.parametrize("sampler", [DDIMSampler(eta=1.0), DPMSolverSampler(eta=1.0)], ids=str)
def test_the_two_sample_test_detects_a_difference(sampler):
    assert agreement(sample(DDIMSampler(), cosine(), steps=4)) < 1e-4

    class Louder(ImageNoise):
        def __call__(self, x):
            return 1.3 * super().__call__(x[None])[0]

    x = torch.randn(4000, 2, 1, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    times = space_timesteps(cosine(), 100)
    result = sampler(ideal_denoiser(cosine()), x, cosine(), times, noise=Louder([3]))
    assert agreement(result) < 1e-3


@pytest.mark.parametrize("steps", [1, 4])
def test_few_steps_are_exact_where_the_network_is_consistent(steps):
    """The way of the ODE from any x_t to its end, which for normal data is a straight line."""
    mean, std, schedule = 0.7, 0.4, linear()

    def consistent(x_t, t):
        alpha, sigma = schedule(t)
        return mean + std * (x_t - alpha * mean) / (alpha**2 * std**2 + sigma**2).sqrt()

    x = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(1)).double()
    sampler, noise = ConsistencySampler(), ImageNoise([7])
    times = sampler.timesteps(schedule, steps)
    x0 = sampler(consistent, x, schedule, times, noise=lambda x: noise(x[None])[0])
    assert abs(x0.mean() - mean) < 4 * std / math.sqrt(len(x0))
    assert abs(x0.std() / std - 1) < 4 / math.sqrt(2 * len(x0))


def test_ddim_is_euler_on_the_flow_schedule():
    schedule, denoise = FlowSchedule(), ideal_denoiser(FlowSchedule())
    x = start().reshape(-1, 2, 1, 1)
    times = space_timesteps(schedule, 10)
    result = DDIMSampler()(denoise, x, schedule, times, noise=torch.randn_like)
    for t, s in pairwise(times):
        velocity = (x - denoise(x, t)) / t  # eps - x0
        x = x + (s - t) * velocity
    assert (result - x).abs().max() < 1e-12


ALL_ENDS = [linear(zero_terminal_snr=True), FlowSchedule(shift=3.0), LaplaceSchedule()]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_all_is_finite_where_there_is_no_noise_or_no_signal(name, spacing):
    """And each step is reported, and what came in is left as it was."""
    sampler = SAMPLERS[name]
    for schedule in ALL_ENDS:
        for steps in (1, 3):
            noise, seen, x = ImageNoise([1, 2]), [], start()
            before = x.clone()
            x0 = sampler(
                ideal(schedule),
                x,
                schedule,
                space_timesteps(schedule, steps, spacing=spacing),
                noise=noise,
                on_step=lambda i, x0_hat, seen=seen: seen.append((i, x0_hat)),
            )
            assert x0.isfinite().all()
            # EDM's Heun has no bound where its r has none.
            assert x0.abs().max() < (math.inf if "edm" in name else 20)
            assert torch.equal(x, before)
            assert [i for i, _ in seen] == list(range(steps))
            # No noise and no memory in the last step: the result is what the denoiser said.
            # PNDM remembers up to the end.
            assert name == "pndm" or torch.allclose(x0, seen[-1][1], atol=1e-9)


def ideal(schedule):
    """The best denoiser of normal data of unit variance, at any level."""

    def denoise(x_t, t):
        alpha, sigma = schedule(t)
        return alpha * x_t / (alpha**2 + sigma**2)

    return denoise


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_do_not_depend_on_their_batch(name):
    sampler, schedule, x = SAMPLERS[name], linear(), start()

    def run(part, seeds):
        times = sampler.timesteps(schedule, 7)
        return sampler(lambda x, t: x.tanh(), x[part], schedule, times, noise=ImageNoise(seeds))

    both = run(slice(0, 2), [1, 2])
    assert torch.equal(both, torch.cat([run(slice(0, 1), [1]), run(slice(1, 2), [2])]))
    assert torch.equal(both, run(slice(0, 2), [1, 2]))


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_step_waits_for_the_device(name):
    """Tensors without numbers: whoever asks for one of them fails."""
    sampler, schedule = SAMPLERS[name], linear()
    x = torch.empty(2, 3, 4, 4, device="meta")
    times = sampler.timesteps(schedule, 6)
    x0 = sampler(lambda x, t: x * t, x, schedule, times, noise=torch.randn_like)
    assert x0.shape == x.shape


def test_a_sampler_keeps_latents_in_their_precision():
    for sampler in SAMPLERS.values():
        x = start().bfloat16()
        times = sampler.timesteps(FlowSchedule(), 5)
        x0 = sampler(lambda x, t: x.tanh(), x, FlowSchedule(), times, noise=torch.randn_like)
        assert x0.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"spacing": "trialing"}, "none of trailing"),
        ({"clip": 0.0}, "above 0"),
        ({"quantile": 0.9}, "needs a quantile .* and a clip"),
        ({"quantile": 1.5, "clip": 1.0}, "up to 1"),
    ],
)
def test_impossible_settings_are_refused(settings, told):
    for make in (DDIMSampler, DPMSolverSampler, UniPCSampler, EDMSampler, ConsistencySampler):
        with pytest.raises(ValueError, match=told):
            make(**settings)


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_more_noise_than_there_is_is_refused(eta):
    for make in (DDIMSampler, DPMSolverSampler):
        with pytest.raises(ValueError, match=r"from 0 .* to 1"):
            make(eta=eta)


def test_consistency_sampling_uses_the_original_timesteps():
    for schedule in (linear(), FlowSchedule()):
        for steps, begin in ((1, 1.0), (4, 1.0), (49, 1.0), (3, 0.5), (2, 0.51)):
            times = ConsistencySampler().timesteps(schedule, steps, start=begin)
            assert times[0] == begin
            assert (times.diff() < 0).all()
            assert torch.allclose((times * 50).round() / 50, times) == (begin != 0.51)
    with pytest.raises(ValueError, match="1 or more"):
        ConsistencySampler(original_steps=0)
    for sampler, steps, begin in (
        (ConsistencySampler(), 51, 1.0),
        (ConsistencySampler(), 26, 0.5),
        (ConsistencySampler(spacing="karras"), 4, 1.0),
    ):
        with pytest.raises(ValueError, match="distilled at 50 even times"):
            sampler.timesteps(linear(), steps, start=begin)
    assert ConsistencySampler(spacing="karras", original_steps=None).timesteps(
        linear(), 60
    ).shape == (61,)
