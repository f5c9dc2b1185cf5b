from itertools import pairwise

import pytest
import torch
from mixture import draw, ideal_denoiser

from ldm.diffusion.samplers.ddim import DDIMSampler
from ldm.diffusion.samplers.inversion import invert_ddim
from ldm.diffusion.samplers.spacing import SPACINGS, space_timesteps
from ldm.diffusion.schedules import FlowSchedule, cosine, linear, scaled_linear

SCHEDULES = {
    "linear": linear(),
    "scaled_linear": scaled_linear(),
    "cosine": cosine(),
    "zero terminal snr": linear(zero_terminal_snr=True),
    "flow": FlowSchedule(),
}


def there_and_back(schedule, *, steps, spacing="trailing", n=256, **settings):
    """Samples of the mixture, the noise they are made of, and what DDIM makes of that."""
    denoise, x0 = ideal_denoiser(schedule), draw(n, torch.Generator().manual_seed(0))
    times = space_timesteps(schedule, steps, spacing=spacing)
    noise = invert_ddim(denoise, x0, schedule, times, **settings)
    return x0, noise, DDIMSampler()(denoise, noise, schedule, times, noise=None)


@pytest.mark.parametrize("name", SCHEDULES)
def test_inversion_and_ddim_return_to_the_image(name):
    x0, noise, again = there_and_back(SCHEDULES[name], steps=50)
    assert (again - x0).abs().max() < 1e-3
    assert (again - x0).abs().median() < 1e-6
    assert noise.mean().abs() < 0.2
    assert noise.std() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_inversion_takes_any_grid(spacing):
    x0, _, again = there_and_back(scaled_linear(), steps=50, spacing=spacing)
    assert (again - x0).abs().max() < 2e-3


def test_more_rounds_come_nearer_and_one_is_the_published_way():
    misses = []
    for rounds in (1, 3, 5, 8):
        x0, _, again = there_and_back(linear(), steps=50, rounds=rounds)
        misses.append((again - x0).square().mean().sqrt().item())
    assert all(b < a / 5 for a, b in pairwise(misses))
    assert misses[0] > 1e-2


def test_the_noise_is_that_of_the_ode():
    """A picture of known noise: the inversion of what DDIM made of it."""
    schedule = cosine()
    denoise, times = ideal_denoiser(schedule), space_timesteps(schedule, 50)
    noise = torch.randn(256, 2, 1, 1, generator=torch.Generator().manual_seed(3)).double()
    x0 = DDIMSampler()(denoise, noise, schedule, times, noise=None)
    found = invert_ddim(denoise, x0, schedule, times, rounds=8)
    # Points of the mixture's edges are nearly lost on the way, and take the longest to find.
    assert (found - noise).abs().flatten(1).max(1).values.quantile(0.9) < 1e-3


def test_images_are_inverted_alone_and_steps_reported():
    schedule, x0 = FlowSchedule(), draw(2, torch.Generator().manual_seed(0))
    denoise, times, seen, before = (
        ideal_denoiser(schedule),
        space_timesteps(schedule, 6),
        [],
        x0.clone(),
    )

    def report(i, x0_hat):
        seen.append((i, x0_hat.shape))

    both = invert_ddim(denoise, x0, schedule, times, on_step=report)
    assert seen == [(i, x0.shape) for i in range(6)]
    assert torch.equal(x0, before)
    alone = torch.cat([invert_ddim(denoise, x0[i : i + 1], schedule, times) for i in range(2)])
    torch.testing.assert_close(alone, both, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inversion_is_stable_at_rounding_errors(dtype):
    """Where a round betters nothing any more, the next ones make it no worse."""
    schedule = scaled_linear()
    x0 = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)

    def denoise(x_t, t):
        alpha, sigma = schedule(t.double())
        return (alpha * x_t.double() / (alpha**2 + sigma**2)).to(dtype)

    times = space_timesteps(schedule, 20)
    noise = invert_ddim(denoise, x0, schedule, times, rounds=20)
    assert noise.dtype == dtype
    again = DDIMSampler()(denoise, noise, schedule, times, noise=None)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.3}[dtype]
    assert (again - x0).abs().max() < tolerance


def test_no_step_waits_for_the_device():
    x = torch.empty(2, 3, 4, 4, device="meta")
    assert (
        invert_ddim(lambda x, t: x * t, x, FlowSchedule(), space_timesteps(FlowSchedule(), 6)).shape
        == x.shape
    )


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="one round or more"):
        there_and_back(linear(), steps=5, rounds=0)
