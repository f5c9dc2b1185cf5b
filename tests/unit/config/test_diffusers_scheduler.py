import inspect
import json
import math

import diffusers
import pytest
import torch
from hydra.utils import instantiate
from oracle import (
    assert_close,
    draw_noise,
    import_sde_scheduler,
    in_double,
    sample_ours,
    sample_theirs,
)

from ldm.config.diffusers_scheduler import (
    change_as_pipeline,
    export_scheduler_config,
    read_scheduler_config,
)
from ldm.config.published_samplers import load_option
from ldm.config.registry import validate_component
from ldm.config.scheduler_defaults import SCHEDULER_DEFAULTS

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD15 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    **BETAS,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
SD21 = {**SD15, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
SDXL = {
    **SD15,
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
TRAILING = {"timestep_spacing": "trailing"}
COSINE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}


def of_class(name, **more):
    """The configuration of Stable Diffusion 1.5 given to another class, as from_config does."""
    return {**SD15, "_class_name": name, **more}


# What folders state, by hand or by from_config.
PUBLISHED = {
    "sd 1.5": SD15,
    "sd 2.1": SD21,
    "sdxl": SDXL,
    "sdxl, karras": {**SDXL, "use_karras_sigmas": True},
    "euler, exponential": of_class("EulerDiscreteScheduler", use_exponential_sigmas=True),
    "euler, defaults": {"_class_name": "EulerDiscreteScheduler"},
    "euler, x0": {"_class_name": "EulerDiscreteScheduler", "prediction_type": "sample"},
    "sd turbo": of_class("EulerDiscreteScheduler", **TRAILING),
    "sdxl turbo": of_class("EulerAncestralDiscreteScheduler", **TRAILING),
    "ancestral": of_class("EulerAncestralDiscreteScheduler"),
    "heun": of_class("HeunDiscreteScheduler"),
    "heun, karras": of_class("HeunDiscreteScheduler", use_karras_sigmas=True),
    "heun, clipped": of_class("HeunDiscreteScheduler", clip_sample=True, clip_sample_range=2.0),
    "dpm": of_class("DPMSolverMultistepScheduler"),
    "dpm, karras": of_class("DPMSolverMultistepScheduler", use_karras_sigmas=True),
    "dpm, sde": of_class("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"),
    "dpm, lu": of_class("DPMSolverMultistepScheduler", use_lu_lambdas=True),
    "dpm, order 1": of_class("DPMSolverMultistepScheduler", solver_order=1, **TRAILING),
    "dpm, defaults": {"_class_name": "DPMSolverMultistepScheduler"},
    "dpm, last sigma": of_class(
        "DPMSolverMultistepScheduler", final_sigmas_type="sigma_min", euler_at_final=True
    ),
    "dpm, clipped": of_class("DPMSolverMultistepScheduler", thresholding=True),
    "dpm, cosine": {"_class_name": "DPMSolverMultistepScheduler", **COSINE},
    "unipc": of_class("UniPCMultistepScheduler", solver_type="midpoint"),
    "unipc, karras": of_class("UniPCMultistepScheduler", use_karras_sigmas=True),
    "unipc, order 3": of_class("UniPCMultistepScheduler", solver_order=3, **TRAILING),
    "ddim, alpha 1": of_class("DDIMScheduler", set_alpha_to_one=True),
    "ddim, zero snr": {**SD21, "rescale_betas_zero_snr": True, **TRAILING},
    "euler, zero snr": {
        **of_class("EulerDiscreteScheduler", rescale_betas_zero_snr=True, **TRAILING),
        "prediction_type": "v_prediction",
    },
    "ddim, linspace": of_class("DDIMScheduler", timestep_spacing="linspace"),
    "ddpm, linspace": of_class("DDPMScheduler", timestep_spacing="linspace"),
    "ddpm, trailing": of_class("DDPMScheduler", **TRAILING),
    "ddpm": of_class("DDPMScheduler"),
    "ddpm, clipped": of_class("DDPMScheduler", clip_sample=True, variance_type="fixed_small_log"),
    "ddpm, thresholding": of_class("DDPMScheduler", thresholding=True, sample_max_value=1e9),
    "ddpm, sigmoid": of_class("DDPMScheduler", beta_schedule="sigmoid"),
    "own betas": of_class(
        "DDIMScheduler", trained_betas=[0.01 + i / 4e4 for i in range(400)], num_train_timesteps=400
    ),
    "lcm": of_class("LCMScheduler", original_inference_steps=50),
    "sde": of_class("DPMSolverSDEScheduler", timestep_spacing="leading"),
    "sde, linspace": of_class("DPMSolverSDEScheduler"),
    "sde, karras": of_class("DPMSolverSDEScheduler", use_karras_sigmas=True),
    "flow": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
}


# Of the midpoints they tell the network a time by log(sigma), here by sigma.
TOLERANCES = {"sde, linspace": 1e-4}


@pytest.fixture(autouse=True)
def double_precision():
    """Whole timesteps become float64 in divisions."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build_theirs(config, monkeypatch):
    name = config["_class_name"]
    if name == "DPMSolverSDEScheduler":
        cls = import_sde_scheduler(monkeypatch)
    else:
        cls = getattr(diffusers, name)
    in_double(monkeypatch, cls)
    return cls.from_config(config)


def sample_both(nodes, scheduler, steps):
    schedule, sampler = instantiate(nodes["scheduler"]), instantiate(nodes["sampler"])
    name = type(scheduler).__name__
    draws, options, noise = ("Ancestral", "DDPM", "LCM", "Multistep"), {}, None
    if "SDE" in name:
        options = {"s_noise": 0.0, "noise_sampler": lambda *sigmas: torch.zeros(())}
        noise = torch.zeros_like  # the rule alone: see test_published_grids.py
    elif any(word in name for word in draws) and "UniPC" not in name:
        options, noise = {"generator": torch.Generator().manual_seed(5)}, draw_noise()
    kind = nodes["objective"]["prediction"]["kind"]
    mine = sample_ours(sampler, schedule, kind, steps, noise=noise)
    return mine, sample_theirs(scheduler, steps, **options)


@pytest.mark.filterwarnings("ignore:at t = 1")
@pytest.mark.parametrize("case", PUBLISHED)
def test_a_published_scheduler_gives_the_latents_of_diffusers(case, monkeypatch):
    config = json.loads(json.dumps(PUBLISHED[case]))
    nodes = read_scheduler_config(config)
    for group, node in nodes.items():
        assert validate_component(node, group) == node, "conf/ names all that a folder builds"
    scheduler = build_theirs(config, monkeypatch)
    for steps in (4, 30):
        assert_close(*sample_both(nodes, scheduler, steps), TOLERANCES.get(case, 1e-9))


@pytest.mark.filterwarnings("ignore:at t = 1")
@pytest.mark.parametrize("case", [case for case in PUBLISHED if case != "flow"])
def test_an_exported_scheduler_is_read_back_as_it_was(case, monkeypatch):
    nodes = read_scheduler_config(PUBLISHED[case])
    exported = json.loads(json.dumps(export_scheduler_config(nodes)))
    again = read_scheduler_config(exported)
    assert again == nodes
    theirs = build_theirs(exported, monkeypatch)
    assert_close(*sample_both(nodes, theirs, 20), TOLERANCES.get(case, 1e-9))


OWN = {
    "the default of a run": ("cosine", "v", "ddim", {}),
    "ddpm": ("scaled_linear", "eps", "ddpm", {}),
    "published grid": ("scaled_linear", "eps", "ddim", {"spacing": "leading", "offset": 1}),
    "dpmpp_2m": ("linear", "eps", "dpmpp_2m", {}),
    "unipc": ("linear", "v", "unipc", {}),
    "euler": ("scaled_linear", "x0", "euler", {}),
    "euler, leading": ("scaled_linear", "v", "euler", {"spacing": "leading", "grid": "euler"}),
    "heun": ("linear", "v", "heun", {"spacing": "leading", "slope": "edm"}),
    "other betas": ("sigmoid_alpha", "v", "ddim", {}),
    "sigmoid betas": ("sigmoid", "eps", "dpmpp_2m", {}),
    "lcm": ("scaled_linear", "eps", "lcm", {}),
    "clipped": ("cosine", "v", "unipc", {"clip": 1.0, "quantile": 0.9}),
}


@pytest.mark.filterwarnings("ignore:at t = 1")
@pytest.mark.parametrize("case", OWN)
def test_a_run_of_ours_is_exported_exactly(case, monkeypatch):
    scheduler, objective, sampler, more = OWN[case]
    nodes = {
        "scheduler": load_option("scheduler", scheduler),
        "objective": load_option("objective", objective),
        "sampler": load_option("sampler", sampler, **more),
    }
    theirs = build_theirs(export_scheduler_config(nodes), monkeypatch)
    for steps in (10, 30):
        assert_close(*sample_both(nodes, theirs, steps), 1e-8)


@pytest.mark.parametrize(
    ("scheduler", "objective", "sampler", "more", "told"),
    [
        ("laplace", "v", "ddim", {}, "cannot hold scheduler=LaplaceSchedule"),
        ("cosine", "flow", "ddim", {}, "cannot hold objective=flow"),
        ("flow", "flow", "ddim", {}, "cannot hold objective=flow"),
        ("flow", "v", "ddim", {}, "cannot hold scheduler=FlowSchedule"),
        ("linear", "eps", "ddim", {"eta": 0.5}, "cannot hold sampler.eta=0.5"),
        ("linear", "eps", "ddim", {"spacing": "ays"}, "spacing=ays"),
        ("linear", "eps", "ddim", {"spacing": "linspace"}, "take sampler.grid=ddim"),
        ("linear", "eps", "ddim", {"spacing": "leading", "clip": 1.0}, "sampler.clip=1.0"),
        ("linear", "eps", "dpmpp_3m", {}, "dpmpp_3m"),
        ("linear", "eps", "dpmpp_2m", {"spacing": "leading"}, "take sampler.grid=dpm"),
        ("linear", "eps", "dpmpp_2m", {"spacing": "karras"}, "take sampler.grid=dpm"),
        ("linear", "eps", "heun", {}, "take sampler.slope=edm"),
        ("linear", "eps", "heun", {"slope": "edm"}, "take sampler.grid=euler"),
        ("linear", "eps", "euler", {"churn": 1.0}, "sampler.churn"),
        ("linear", "v", "pndm", {"spacing": "leading"}, "take sampler.average=v"),
        ("linear", "x0", "pndm", {"spacing": "leading"}, "cannot hold objective=x0"),
        ("linear", "eps", "lcm", {"original_steps": None}, "original_steps=null"),
        ("linear", "eps", "ddpm", {"spacing": "leading", "set_alpha_to_one": False}, "take true"),
    ],
)
def test_what_diffusers_cannot_hold_is_named(scheduler, objective, sampler, more, told):
    nodes = {
        "scheduler": load_option("scheduler", scheduler),
        "objective": load_option("objective", objective),
        "sampler": load_option("sampler", sampler, **more),
    }
    with pytest.raises(ValueError, match=told):
        export_scheduler_config(nodes)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"_class_name": "TCDScheduler"}, "TCDScheduler, which is none of DDIM"),
        ({}, "_class_name=None"),
        ({**SD15, "skip_prk_steps": False}, "skip_prk_steps=False"),
        ({**SD15, "beta_schedule": "exp"}, "beta_schedule=exp"),
        ({**SD15, "prediction_type": "flow_prediction"}, "prediction_type=flow_prediction"),
        ({**SD15, "trained_betas": [0.1, 0.2]}, "num_train_timesteps=1000"),
        ({**SD15, "colour": "red"}, "colour=red"),
        ({**SDXL, "interpolation_type": "log_linear"}, "interpolation_type=log_linear"),
        ({**SDXL, "use_beta_sigmas": True}, "use_beta_sigmas=True"),
        ({**SDXL, "sigma_min": 0.1, "sigma_max": 5}, "sigma_max=5, sigma_min=0.1"),
        ({**SDXL, "final_sigmas_type": "sigma_min"}, "final_sigmas_type=sigma_min"),
        (of_class("DPMSolverMultistepScheduler", solver_order=3), "solver_order=3"),
        (of_class("DPMSolverMultistepScheduler", solver_type="heun"), "solver_type=heun"),
        (of_class("DPMSolverMultistepScheduler", use_flow_sigmas=True), "use_flow_sigmas=True"),
        (
            of_class("DPMSolverMultistepScheduler", final_sigmas_type="sigma_min"),
            "final_sigmas_type",
        ),
        (
            of_class("DPMSolverMultistepScheduler", use_karras_sigmas=True, **COSINE),
            "use_karras_sigmas=True",
        ),
        (of_class("UniPCMultistepScheduler", lower_order_final=False), "lower_order_final=False"),
        (of_class("DDPMScheduler", variance_type="learned_range"), "variance_type=learned_range"),
        (of_class("DDPMScheduler", thresholding=True, sample_max_value=1.5), "sample_max_value"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
            "use_dynamic_shifting=True",
        ),
    ],
)
def test_what_we_cannot_hold_is_named(config, told):
    with pytest.raises(ValueError, match=told):
        read_scheduler_config(config)


def test_a_folder_is_read_as_the_pipeline_of_stable_diffusion_reads_it():
    changed = change_as_pipeline({"_class_name": "DDIMScheduler", **BETAS})
    sampler = read_scheduler_config(changed)["sampler"]
    assert (sampler["offset"], sampler["clip"]) == (1, None)


def test_the_differences_that_stay_are_told():
    with pytest.warns(UserWarning, match="is 1000 // steps long"):
        read_scheduler_config({**SD15, **TRAILING})
    sampler = load_option("sampler", "pndm")
    nodes = {**read_scheduler_config(SD15), "sampler": sampler}
    with pytest.warns(UserWarning, match="only if steps divide 1000"):
        export_scheduler_config(nodes)
    with pytest.warns(UserWarning, match="keeps the network's noise"):
        read_scheduler_config(of_class("DDIMScheduler", clip_sample=True))


@pytest.mark.parametrize("name", SCHEDULER_DEFAULTS)
def test_the_defaults_are_those_of_diffusers(name, monkeypatch):
    cls = getattr(diffusers, name)
    if name == "DPMSolverSDEScheduler":
        cls = import_sde_scheduler(monkeypatch)
    parameters = inspect.signature(inspect.unwrap(cls.__init__)).parameters
    theirs = {key: each.default for key, each in parameters.items() if key != "self"}
    assert theirs == SCHEDULER_DEFAULTS[name]
    assert all(math.isfinite(v) for v in theirs.values() if isinstance(v, float) and v > 0)
