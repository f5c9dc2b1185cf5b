"""How fast solvers come to the truth as steps grow: the slope of their error, log over log."""

import math

import diffusers
import pytest
import torch
from mixture import draw, ideal_denoiser
from oracle import SCHEDULES, in_double
from scipy.integrate import solve_ivp
from test_multistep import WholeLastTerm

from ldm.diffusion.samplers.ddim import DDIMSampler
from ldm.diffusion.samplers.edm import EDMSampler
from ldm.diffusion.samplers.multistep import DPMSolverSampler, UniPCSampler

N, START, END = 32, 0.99, 0.02  # points, where they begin in t, where they end in sigma / alpha
STEPS = [120, 240]
SLOPES = {
    "ddim": (DDIMSampler(), 1),
    "euler": (EDMSampler(order=1), 1),
    "heun": (EDMSampler(), 2),
    "heun, edm": (EDMSampler(slope="edm"), 2),
    "heun, x0": (EDMSampler(slope="x0"), 2),
    "dpmpp_2m": (DPMSolverSampler(), 2),
    "unipc 1": (UniPCSampler(order=1), 2),
    "dpmpp_3m": (DPMSolverSampler(order=3), 3),
    "unipc 2": (UniPCSampler(order=2), 3),
}


def begin(schedule):
    t = torch.tensor(START, dtype=torch.float64)
    alpha, sigma = schedule(t)
    x0 = draw(N, torch.Generator().manual_seed(0))
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return alpha * x0 + sigma * noise


def places(schedule, steps):
    """Times even in log(alpha / sigma), from START to END."""
    t = torch.tensor([START], dtype=torch.float64)
    first = schedule.noise_to_signal_ratio(t).log().item()
    r = torch.linspace(first, math.log(END), steps + 1, dtype=torch.float64).exp()
    return torch.cat([t, schedule.timesteps_at_ratio(r[1:])])


@pytest.fixture(scope="module")
def truth():
    """The end of each point by an integrator of order 8 that knows nothing of ours.

    In x / alpha and r = sigma / alpha the ODE is dx/dr = (x - x0_hat) / r on every schedule.
    """
    denoise = ideal_denoiser(lambda r: (torch.ones_like(r), r))

    def velocity(log_r, y):
        y = torch.from_numpy(y).reshape(N, 2, 1, 1)
        return (y - denoise(y, torch.tensor(math.exp(log_r)))).flatten().numpy()

    ends = {}
    for name in ("linear", "flow"):
        schedule = SCHEDULES[name][0]
        first, last = schedule(places(schedule, 1))[0]
        y = (begin(schedule) / first).flatten().numpy()
        span = schedule.noise_to_signal_ratio(places(schedule, 1)).log().tolist()
        ode = solve_ivp(velocity, span, y, method="DOP853", rtol=1e-9, atol=1e-11)
        ends[name] = last * torch.from_numpy(ode.y[:, -1].copy()).reshape(N, 2, 1, 1)
    return ends


def slope(errors):
    """Of the logarithm of the error over that of the steps, downwards."""
    return math.log(errors[0] / errors[1]) / math.log(STEPS[1] / STEPS[0])


def errors_of(sampler, schedule, truth):
    errors = []
    for steps in STEPS:
        times = places(schedule, steps)
        end = sampler(ideal_denoiser(schedule), begin(schedule), schedule, times, noise=None)
        errors.append((end - truth).square().mean().sqrt().item())
    return errors


@pytest.mark.parametrize("name", ["linear", "flow"])
@pytest.mark.parametrize("case", SLOPES)
def test_errors_fall_with_the_order(case, name, truth):
    sampler, order = SLOPES[case]
    errors = errors_of(sampler, SCHEDULES[name][0], truth[name])
    assert slope(errors) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("name", ["linear", "flow"])
def test_unipc_of_order_three_converges_at_third_order(name, truth):
    """Its corrector is of fourth order; what is left are the first two steps."""
    assert slope(errors_of(UniPCSampler(), SCHEDULES[name][0], truth[name])) > 2.8


@pytest.mark.parametrize("cls", [diffusers.DPMSolverMultistepScheduler, WholeLastTerm])
def test_the_published_third_order_converges_at_second_order(cls, truth, monkeypatch):
    """What DPMSolver says of the last term: theirs, as it is and with the other half of it."""
    in_double(monkeypatch, cls, diffusers.DPMSolverMultistepScheduler)
    schedule, table = SCHEDULES["linear"]
    scheduler = cls(
        **table, solver_order=3, prediction_type="sample", final_sigmas_type="sigma_min"
    )
    errors = []
    for steps in (2 * STEPS[0], 2 * STEPS[1]):
        times, x = places(schedule, steps), begin(schedule)
        scheduler.set_timesteps(steps)
        scheduler.sigmas = schedule.noise_to_signal_ratio(times)
        scheduler.set_begin_index(0)
        for t in times[:-1]:
            x = scheduler.step(ideal_denoiser(schedule)(x, t), t, x).prev_sample
        errors.append((x - truth["linear"]).square().mean().sqrt().item())
    order = 3 if cls is WholeLastTerm else 2
    assert slope(errors) == pytest.approx(order, abs=0.2)
