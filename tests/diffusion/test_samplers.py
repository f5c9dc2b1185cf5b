from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from mixture import draw, ideal_denoiser
from scipy.stats import ks_2samp
from test_schedule import ORACLES

from ldm.diffusion.noise import ImageNoise
from ldm.diffusion.objective import Prediction
from ldm.diffusion.samplers import DDIM
from ldm.diffusion.schedule import Flow, cosine, linear

KINDS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def network(x, k):
    """Any smooth function of x_t and the timestep stands for a network."""
    return (1.7 * x + k / 300).sin() * 0.8 + 0.1 * x


def trajectory(schedule, kind, *, steps, eta, spacing):
    """All x_t that a sampler of ours hands to the network, and the result."""
    seen, generator = [], torch.Generator().manual_seed(5)
    prediction = Prediction(kind)

    def denoise(x_t, t):
        seen.append(x_t)
        return prediction.to_x0(network(x_t, schedule.timestep(t)), x_t, *schedule(t))

    def noise(x):
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)

    x = start()
    times = schedule.times(steps, spacing=spacing)
    x0 = DDIM(eta=eta)(denoise, x, schedule, times, noise=noise)
    return [*seen[1:], x0]


def start():
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def oracle_trajectory(scheduler, schedule, *, steps, **options):
    # The tables of diffusers are rounded to float32 (test_schedule.py compares them): here the
    # update rules are compared, in float64 and on one table, where alpha can be as small as 5e-5.
    table = schedule(torch.arange(1, 1001, dtype=torch.float64) / 1000)[0] ** 2
    scheduler.alphas_cumprod, scheduler.one = table, torch.ones((), dtype=torch.float64)
    scheduler.set_timesteps(steps)
    x, seen, generator = start(), [], torch.Generator().manual_seed(5)
    for k in scheduler.timesteps:
        x = scheduler.step(network(x, k), k, x, generator=generator, **options).prev_sample
        seen.append(x)
    return seen


def assert_same(ours, theirs):
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        scale = b.abs().max().clamp(min=1)
        assert ((a - b).abs().max() / scale) < 1e-5, f"step {i}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("steps", [5, 20, 50])
@pytest.mark.parametrize(
    ("eta", "spacing"), [(0.0, "trailing"), (0.0, "leading"), (0.5, "trailing")]
)
def test_ddim_is_that_of_diffusers(kind, name, steps, eta, spacing):
    make, options = ORACLES[name]
    oracle = DDIMScheduler(
        **options, prediction_type=KINDS[kind], clip_sample=False, timestep_spacing=spacing
    )
    theirs = oracle_trajectory(oracle, make(), steps=steps, eta=eta)
    assert_same(trajectory(make(), kind, steps=steps, eta=eta, spacing=spacing), theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("steps", [20, 50, 1000])
def test_ddpm_is_that_of_diffusers(kind, name, steps):
    make, options = ORACLES[name]
    oracle = DDPMScheduler(
        **options, prediction_type=KINDS[kind], clip_sample=False, timestep_spacing="trailing"
    )
    theirs = oracle_trajectory(oracle, make(), steps=steps)
    assert_same(trajectory(make(), kind, steps=steps, eta=1.0, spacing="trailing"), theirs)


def agreement(samples, n=4000):
    """The smallest p value of two-sample tests along eight directions."""
    truth = draw(n, torch.Generator().manual_seed(11))
    p_values = []
    for angle in torch.arange(8) * torch.pi / 8:
        axis = torch.stack([angle.cos(), angle.sin()]).double()
        project = [(part[:, :, 0, 0] @ axis).numpy() for part in (samples, truth)]
        p_values.append(ks_2samp(*project).pvalue)
    return min(p_values)


def sample(schedule, *, steps, eta, n=4000, louder=1.0):
    x = torch.randn(n, 2, 1, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    noise = ImageNoise([3])
    return DDIM(eta=eta)(
        ideal_denoiser(schedule),
        x,
        schedule,
        schedule.times(steps),
        noise=lambda x: louder * noise(x[None])[0],
    )


# scaled_linear keeps 7 % of signal at t = 1, so that its prior is not quite N(0, 1).
@pytest.mark.parametrize("schedule", [linear(), cosine(), Flow()])
@pytest.mark.parametrize(("steps", "eta"), [(200, 0.0), (1000, 1.0)])
def test_samplers_reach_the_mixture(schedule, steps, eta):
    assert agreement(sample(schedule, steps=steps, eta=eta)) > 0.01


def test_the_two_sample_test_can_tell():
    assert agreement(sample(cosine(), steps=4, eta=0.0)) < 1e-4
    assert agreement(sample(cosine(), steps=200, eta=1.0, louder=1.3)) < 1e-4


def test_ddim_is_euler_on_the_flow_schedule():
    schedule, denoise = Flow(), ideal_denoiser(Flow())
    x = start().reshape(-1, 2, 1, 1)
    times = schedule.times(10)
    ours = DDIM()(denoise, x, schedule, times, noise=torch.randn_like)
    for t, s in pairwise(times):
        velocity = (x - denoise(x, t)) / t  # eps - x0
        x = x + (s - t) * velocity
    assert (ours - x).abs().max() < 1e-12


def test_samples_do_not_depend_on_their_batch_and_steps_are_reported():
    schedule, seen = linear(), []
    x = start()

    def run(part, seeds):
        noise = ImageNoise(seeds)
        return DDIM(eta=1.0)(
            lambda x, t: x.tanh(),
            x[part],
            schedule,
            schedule.times(7),
            noise=noise,
            on_step=lambda i, x0_hat: seen.append((i, x0_hat.shape)),
        )

    both = run(slice(0, 2), [1, 2])
    assert torch.equal(both, torch.cat([run(slice(0, 1), [1]), run(slice(1, 2), [2])]))
    assert seen[:7] == [(i, x.shape) for i in range(7)]
