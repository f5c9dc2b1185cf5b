"""Schedulers of diffusers, run in double precision beside our samplers, on one grid and one noise.

Their code rounds to float32 inside (tables, sigmas and, in most, the latents of each step), so that
rules could be compared to some 1e-4 only. Here float32 is float64 under the names by which their
modules call torch and numpy: it is their code that runs.
"""

import sys
import types
from importlib import import_module

import torch

from ldm.diffusion.predictions import Prediction
from ldm.diffusion.schedules import FlowSchedule, cosine, linear, scaled_linear

SCHEDULES = {
    "linear": (linear(), {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
    "scaled_linear": (
        scaled_linear(),
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ),
    "cosine": (cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
    "flow": (FlowSchedule(), {"use_flow_sigmas": True}),
}
KINDS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample", "flow": "flow_prediction"}
STEPS = [5, 20, 50]


class Double:
    """A module whose float32 is float64."""

    def __init__(self, module):
        self.module = module

    def __getattr__(self, name):
        return getattr(self.module, "float64" if name == "float32" else name)


def in_double(monkeypatch, *classes):
    """Let the schedulers of these classes compute in float64 for the rest of the test."""
    for module in {sys.modules[cls.__module__] for cls in classes}:
        for name in {"torch", "np"} & set(vars(module)):
            if not isinstance(vars(module)[name], Double):
                monkeypatch.setattr(module, name, Double(vars(module)[name]))


def network(x, k):
    """Any smooth function of x_t and the timestep stands for a network."""
    return (1.7 * x + k / 300).sin() * 0.8 + 0.1 * x


def start():
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def generator():
    return torch.Generator().manual_seed(5)


def theirs(scheduler, steps, *, sigmas=None, **options):
    """All latents that the scheduler hands to the network after the first, and the result."""
    scheduler.set_timesteps(steps, **({} if sigmas is None else {"sigmas": sigmas}))
    x, seen = start(), []
    if type(scheduler).__name__.startswith(("Euler", "Heun")):
        x = x * (1 + scheduler.sigmas[0] ** 2).sqrt()  # they count in x / alpha
    for k in scheduler.timesteps:
        x_t = (
            x if not hasattr(scheduler, "scale_model_input") else scheduler.scale_model_input(x, k)
        )
        seen.append(x_t)
        x = scheduler.step(network(x_t, k), k, x, **options).prev_sample
    return [*seen[1:], x]


def ours(sampler, schedule, kind, scheduler):
    """The same of our sampler, at the levels and timesteps of a scheduler that has been used."""
    prediction, seen, places = Prediction(kind), [], grid(scheduler, schedule)
    told = dict(zip(places.tolist(), once(scheduler, scheduler.timesteps), strict=False))
    noise = generator()

    def denoise(x_t, t):
        seen.append(x_t)
        return prediction.to_x0(network(x_t, told[t.item()]), x_t, *schedule(t))

    def draw(x):
        return torch.randn(x.shape, generator=noise, dtype=x.dtype)

    x0 = sampler(denoise, start(), schedule, places, noise=draw)
    return [*seen[1:], x0]


def grid(scheduler, schedule):
    """The times (steps + 1,) of a scheduler, by its noise levels where it has them."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        times = (scheduler.timesteps.double() + 1) / 1000
        return torch.cat([times, torch.zeros(1, dtype=torch.float64)])
    sigmas = torch.stack(once(scheduler, sigmas)).double()
    return sigmas if isinstance(schedule, FlowSchedule) else schedule.timesteps_at_ratio(sigmas)


def once(scheduler, values):
    """Heun names what it asks twice at twice."""
    values = list(values)
    return [values[0], *values[1::2]] if "Heun" in type(scheduler).__name__ else values


def assert_same(mine, their, tolerance=1e-7):
    assert len(mine) == len(their)
    for i, (a, b) in enumerate(zip(mine, their, strict=True)):
        assert ((a - b).abs().max() / b.abs().max().clamp(min=1)) < tolerance, f"step {i}"


def sample_theirs(scheduler, steps, *, noise_sampler=None, **options):
    """As a pipeline of diffusers does, from the same noise as `sample_ours`."""
    scheduler.set_timesteps(steps)
    if noise_sampler is not None:
        scheduler.noise_sampler = noise_sampler
    x = start() * getattr(scheduler, "init_noise_sigma", 1.0)
    for k in scheduler.timesteps:
        scaled = x
        if hasattr(scheduler, "scale_model_input"):
            scaled = scheduler.scale_model_input(x, k)
        x = scheduler.step(network(scaled, k), k, x, **options).prev_sample
    return x


def sample_ours(sampler, schedule, kind, steps, *, noise=None):
    """As `Pipeline` does."""
    prediction, x = Prediction(kind), start()

    def denoise(x_t, t):
        out = network(x_t, sampler.network_timestep(schedule, t))
        return prediction.to_x0(out, x_t, *schedule(t))

    times = sampler.timesteps(schedule, steps)
    x = sampler.noise_scale(schedule, steps) * x
    return sampler(denoise, x, schedule, times, noise=noise)


def assert_close(mine, their, tolerance=1e-9):
    assert mine.isfinite().all()
    assert ((mine - their).abs().max() / their.abs().max()).item() < tolerance


def draw_noise():
    numbers = torch.Generator().manual_seed(5)
    return lambda x: torch.randn(x.shape, generator=numbers, dtype=x.dtype)


def import_sde_scheduler(monkeypatch):
    """diffusers' class, whose module wants torchsde for a noise that is not used here."""
    monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
    module = import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    return module.DPMSolverSDEScheduler
