"""Schedulers of diffusers to samplers of ours that give the same latents."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

from omegaconf import OmegaConf

from ldm.config.search_path import CONF_DIR
from ldm.models.diffusers_config import ForeignConfig

BOUNDS = (
    *("clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio"),
    "sample_max_value",
)
UNBOUNDED = 1e6  # no x0_hat is as large


def load_option(group: str, name: str, **changes: object) -> dict:
    """An option of conf/ as plain values, with other values of some keys."""
    node = OmegaConf.to_container(OmegaConf.load(Path(CONF_DIR, group, f"{name}.yaml")))
    return {**cast(dict, node), **changes}


def read_even_spacing(values: ForeignConfig) -> dict:
    """`spacing`, and `offset`, which diffusers reads only for `leading`."""
    spacing, offset = values.read("timestep_spacing"), values.read("steps_offset")
    return {"spacing": spacing, "offset": offset if spacing == "leading" else 0}


def read_bounds(values: ForeignConfig) -> dict:
    """`clip` and `quantile`; with sample_max_value = 1 dynamic thresholding only clips."""
    given = values.values
    values.ignore(*BOUNDS)
    if given.get("thresholding"):
        most = given["sample_max_value"]
        if 1 < most < UNBOUNDED:
            raise ValueError(
                f"{values.kind}: we cannot hold thresholding with sample_max_value={most}"
            )
        quantile = given["dynamic_thresholding_ratio"] if most > 1 else None
        return {"clip": min(1.0, most), "quantile": quantile}
    return {"clip": given["clip_sample_range"]} if given.get("clip_sample") else {}


def read_ddim(values: ForeignConfig, kind: str) -> dict:
    """The sampler of DDIMScheduler, with the pipeline's default eta = 0."""
    bounds = read_bounds(values)
    if bounds:
        warnings.warn(
            "diffusers' DDIM clips x0 but keeps the network's noise, and ours keeps neither: where "
            "something is clipped, the latents differ",
            stacklevel=4,
        )
    grid = {**read_ddim_grid(values), "set_alpha_to_one": values.read("set_alpha_to_one")}
    return load_option("sampler", "ddim", **grid, **bounds)


def read_ddpm(values: ForeignConfig, kind: str) -> dict:
    """The sampler of DDPMScheduler."""
    values.read_choice("variance_type", "fixed_small", "fixed_small_log")
    grid = read_even_spacing(values)
    return load_option("sampler", "ddpm", **grid, **read_bounds(values))


def read_pndm(values: ForeignConfig, kind: str) -> dict:
    """The sampler of PNDMScheduler without Runge-Kutta steps."""
    if not values.read("skip_prk_steps"):
        raise ValueError(f"{values.kind}: we cannot hold skip_prk_steps=False (Runge-Kutta steps)")
    if kind == "x0":
        raise ValueError(f"{values.kind} cannot hold prediction_type='sample', in diffusers either")
    grid = {**read_even_spacing(values), "set_alpha_to_one": values.read("set_alpha_to_one")}
    if grid["spacing"] != "leading":
        warnings.warn(
            f"each step of diffusers' {values.kind} is 1000 // steps long, and with "
            f"timestep_spacing={grid['spacing']} the next one begins elsewhere: ours ends where "
            "the next begins, so that the latents differ",
            stacklevel=4,
        )
    return load_option("sampler", "pndm", average=kind, **grid)


def read_ddim_grid(values: ForeignConfig) -> dict:
    """The times of DDIM, whose steps are equally long with any spacing."""
    grid = read_even_spacing(values)
    return grid if grid["spacing"] == "leading" else {**grid, "grid": "ddim"}


def read_lcm(values: ForeignConfig, kind: str) -> dict:
    """The sampler of LCMScheduler, whose times depend on no spacing."""
    values.ignore("timestep_spacing", "steps_offset", "set_alpha_to_one")
    return load_option(
        "sampler",
        "lcm",
        original_steps=values.read("original_inference_steps"),
        timestep_scaling=values.read("timestep_scaling"),
        **read_bounds(values),
    )


def read_euler_family(option: str) -> Callable[[ForeignConfig, str], dict]:
    """Returns the reader of a scheduler that counts in sigma, as k-diffusion does."""

    def read(values: ForeignConfig, kind: str) -> dict:
        grid = {"grid": "euler", **read_even_spacing(values)}
        for key, spacing in (("karras", "karras"), ("exponential", "logsnr")):
            if values.values.get(f"use_{key}_sigmas"):
                values.ignore(f"use_{key}_sigmas")
                grid |= {"ends": grid["spacing"], "spacing": spacing}
        if option == "heun":
            grid["slope"] = "edm"
        if kind == "x0" and option in ("euler_ancestral", "dpmpp_sde"):
            raise ValueError(f"{values.kind} cannot hold prediction_type='sample', in diffusers")
        return load_option("sampler", option, **grid, **read_bounds(values))

    return read


def read_dpm_grid(values: ForeignConfig, whole_table: Mapping[str, str]) -> dict:
    """The grid of DPM-Solver and UniPC; whole_table: our spacings by their keys."""
    grid = {"grid": "dpm", **read_even_spacing(values)}
    for key, spacing in whole_table.items():
        if values.values.get(key):
            values.ignore(key)
            grid |= {"spacing": spacing, "offset": 0}
    values.ignore("flow_shift", "time_shift_type")  # of use_flow_sigmas and use_dynamic_shifting
    return grid


def read_dpm(values: ForeignConfig, kind: str) -> dict:
    """The sampler of DPMSolverMultistepScheduler of order 1 or 2."""
    whole_table = {"use_lu_lambdas": "logsnr"}
    if values.values["beta_schedule"] != "squaredcos_cap_v2":
        whole_table["use_karras_sigmas"] = "karras"  # else they cut timesteps off
    grid = read_dpm_grid(values, whole_table)
    algorithm = values.read_choice("algorithm_type", "dpmsolver++", "sde-dpmsolver++")
    option = "dpmpp_2m_sde" if algorithm.startswith("sde") else "dpmpp_2m"
    order = values.read_choice("solver_order", 1, 2)
    if order == 2:
        values.read_choice("solver_type", "midpoint", "logrho", "bh1", "bh2")
    values.read_choice("variance_type", None, "fixed_small", "fixed_small_log", "fixed_large")
    # The last step is of order 1 here, and to no noise in diffusers too.
    values.ignore("lower_order_final", "solver_type")
    ends = ["zero", "sigma_min"] if values.read("euler_at_final") or order == 1 else ["zero"]
    grid["set_alpha_to_one"] = values.read_choice("final_sigmas_type", *ends) == "zero"
    return load_option("sampler", option, order=order, **grid, **read_bounds(values))


def read_unipc(values: ForeignConfig, kind: str) -> dict:
    """The sampler of UniPCMultistepScheduler."""
    grid = read_dpm_grid(values, {"use_karras_sigmas": "karras"})
    values.read_choice("solver_type", "bh2", "midpoint", "heun", "logrho")
    ends = ["zero"] if grid["spacing"] == "karras" else ["zero", "sigma_min"]
    grid["set_alpha_to_one"] = values.read_choice("final_sigmas_type", *ends) == "zero"
    order = values.read_choice("solver_order", 1, 2, 3)
    return load_option("sampler", "unipc", order=order, **grid, **read_bounds(values))


SAMPLER_READERS: Mapping[str, Callable[[ForeignConfig, str], dict]] = {
    "DDIMScheduler": read_ddim,
    "DDPMScheduler": read_ddpm,
    "PNDMScheduler": read_pndm,
    "LCMScheduler": read_lcm,
    "EulerDiscreteScheduler": read_euler_family("euler"),
    "EulerAncestralDiscreteScheduler": read_euler_family("euler_ancestral"),
    "HeunDiscreteScheduler": read_euler_family("heun"),
    "DPMSolverSDEScheduler": read_euler_family("dpmpp_sde"),
    "DPMSolverMultistepScheduler": read_dpm,
    "UniPCMultistepScheduler": read_unipc,
}
