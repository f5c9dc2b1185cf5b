"""Our samplers as schedulers of diffusers: the name of the class, and its settings."""

import warnings
from collections.abc import Mapping

from ldm.config.published_samplers import UNBOUNDED, load_option
from ldm.diffusion.samplers.spacing import LINEAR_SPACINGS

# The class of a sampler, and the option of conf/ that has its defaults.
SAMPLER_OPTIONS = {
    "DDIMSampler": "ddim",
    "ConsistencySampler": "lcm",
    "EDMSampler": "heun",
    "PNDMSampler": "pndm",
    "DPMSolverSampler": "dpmpp_2m",
    "DPMSolverSDESampler": "dpmpp_sde",
    "UniPCSampler": "unipc",
}
EULER_SPACINGS = {"karras": "use_karras_sigmas", "logsnr": "use_exponential_sigmas"}
DPM = "DPMSolverMultistepScheduler"


def format_sampler_words(node: Mapping[str, object]) -> str:
    """A sampler's class and grid, for messages."""
    target = str(node["_target_"]).rpartition(".")[2]
    grid = {key: node.get(key) for key in ("spacing", "offset", "grid", "set_alpha_to_one")}
    words = [f"sampler.{key}={value}" for key, value in grid.items() if value is not None]
    return " ".join([target, *words])


def export_sampler(node: Mapping[str, object], *, zero_snr: bool) -> tuple[str, dict]:
    """The class of a diffusers scheduler with the same times and rule, and its keys.

    ValueError that names what diffusers cannot hold, and what to take instead.
    """
    target = str(node["_target_"]).rpartition(".")[2]
    if target not in SAMPLER_OPTIONS or not str(node["_target_"]).startswith("ldm."):
        raise ValueError(f"diffusers cannot hold sampler={node['_target_']}: take sampler=ddim")
    settings = {**load_option("sampler", SAMPLER_OPTIONS[target]), **node}
    name, keys = choose_scheduler_class(target, settings, zero_snr=zero_snr)
    grid = export_grid(name, settings)
    return name, {**grid, **keys, **export_bounds(name, settings)}


def choose_scheduler_class(target: str, settings: Mapping, *, zero_snr: bool) -> tuple[str, dict]:
    """The class of the rule on this grid, and the keys of the rule."""
    grid, eta = settings["grid"], settings.get("eta", 0.0)
    if eta not in (0, 1):
        raise ValueError(
            f"diffusers' scheduler_config.json cannot hold sampler.eta={eta}: take 0 or 1"
        )
    if settings.get("churn"):
        raise ValueError("diffusers' scheduler_config.json cannot hold sampler.churn: take 0")
    if target == "PNDMSampler":
        return "PNDMScheduler", {"skip_prk_steps": True}
    if target == "ConsistencySampler":
        if settings["original_steps"] is None:
            raise ValueError("diffusers' LCMScheduler cannot hold sampler.original_steps=null")
        scaling = settings["timestep_scaling"] or 1e6  # of no effect
        return "LCMScheduler", {
            "original_inference_steps": settings["original_steps"],
            "timestep_scaling": scaling,
        }
    if target == "DPMSolverSDESampler":
        if eta != 1:
            raise ValueError("diffusers' DPMSolverSDEScheduler cannot hold sampler.eta=0: take 1")
        return "DPMSolverSDEScheduler", {}
    if target == "UniPCSampler":
        return "UniPCMultistepScheduler", {"solver_order": settings["order"]}
    if target == "EDMSampler" and settings["order"] == 2:
        if settings["slope"] != "edm":
            raise ValueError(
                f"diffusers' HeunDiscreteScheduler cannot hold sampler.slope={settings['slope']}: "
                "take sampler.slope=edm"
            )
        return "HeunDiscreteScheduler", {}
    if target == "DPMSolverSampler" and settings["order"] != 1:
        if settings["order"] == 3:
            raise ValueError(
                "diffusers cannot hold sampler=dpmpp_3m: its third order has half of the last "
                "term. Take sampler=dpmpp_2m"
            )
        return DPM, export_dpm(settings["order"], eta)
    # The rest is the rule of first order, which diffusers has on each of its grids.
    if grid == "euler":
        return ("EulerAncestralDiscreteScheduler" if eta else "EulerDiscreteScheduler"), {}
    is_trailing = grid is None and settings["spacing"] == "trailing"
    if grid == "dpm" or (is_trailing and not zero_snr and not eta):  # see grid=ddim
        return DPM, export_dpm(1, eta)
    return ("DDPMScheduler" if eta else "DDIMScheduler"), {}


def export_dpm(order: int, eta: float) -> dict:
    """The keys of DPM-Solver++ with the last step of first order."""
    algorithm = "sde-dpmsolver++" if eta else "dpmsolver++"
    return {"solver_order": order, "algorithm_type": algorithm, "euler_at_final": True}


def export_grid(name: str, settings: Mapping) -> dict:
    """The keys of the times; ValueError where this class has no such grid."""
    spacing, offset, grid = settings["spacing"], settings["offset"], settings["grid"]
    is_euler = name.startswith(("Euler", "Heun", "DPMSolverSDE"))
    is_dpm = name in (DPM, "UniPCMultistepScheduler")
    own = "euler" if is_euler else "dpm" if is_dpm else "ddim"
    # Without a grid ours has the same times with these spacings; DDIM, if steps divide the table.
    same = ("leading",) if is_euler else ("trailing",) if is_dpm else ("leading", "trailing")
    same = LINEAR_SPACINGS if name == "DDPMScheduler" else same
    if name == "LCMScheduler":
        return {}
    if spacing == "ays" or (own == "ddim" and spacing in EULER_SPACINGS):
        raise ValueError(
            f"diffusers' {name} cannot hold {format_sampler_words(settings)}: take "
            "sampler.spacing=leading or trailing"
        )
    if (grid != own or name == "DDPMScheduler") and not (grid is None and spacing in same):
        own = "null" if name == "DDPMScheduler" else own
        raise ValueError(
            f"diffusers' {name} has other times than {format_sampler_words(settings)}: take "
            f"sampler.grid={own}"
        )
    if (own, grid, spacing) == ("ddim", None, "trailing") and name != "DDPMScheduler":
        remedy = "spacing=leading" if name == "PNDMScheduler" else "grid=ddim"
        warnings.warn(
            f"diffusers' {name} gives the same only if steps divide 1000 (10, 20, 25, 40, 50): "
            f"sampler.{remedy} has its times for any",
            stacklevel=4,
        )
    keys = {"timestep_spacing": spacing, "steps_offset": offset}
    if is_euler and spacing in EULER_SPACINGS:
        if name == "EulerAncestralDiscreteScheduler":
            raise ValueError(f"diffusers' {name} cannot hold sampler.spacing={spacing}")
        keys |= {"timestep_spacing": settings["ends"], EULER_SPACINGS[spacing]: True}
    elif is_dpm and spacing in EULER_SPACINGS:
        if spacing == "logsnr" and name != DPM:
            raise ValueError(f"diffusers' {name} cannot hold sampler.spacing=logsnr: take karras")
        key = "use_karras_sigmas" if spacing == "karras" else "use_lu_lambdas"
        keys = {key: True}
    return keys | export_last_alpha(name, spacing, one=settings["set_alpha_to_one"])


def export_last_alpha(name: str, spacing: str, *, one: bool) -> dict:
    """The key of the last noise level."""
    if name in ("DDIMScheduler", "PNDMScheduler"):
        return {"set_alpha_to_one": one}
    has_sigma_min = name == DPM or (name == "UniPCMultistepScheduler" and spacing != "karras")
    if not one and not has_sigma_min:
        raise ValueError(f"diffusers' {name} cannot hold sampler.set_alpha_to_one=false: take true")
    return {} if one else {"final_sigmas_type": "sigma_min"}


def export_bounds(name: str, settings: Mapping) -> dict:
    """The keys of `clip` and `quantile`."""
    clip, quantile = settings["clip"], settings["quantile"]
    if clip is None:
        return {"clip_sample": False}
    has_range = name in ("DDPMScheduler", "HeunDiscreteScheduler", "LCMScheduler")
    if quantile is None and has_range:
        return {"clip_sample": True, "clip_sample_range": clip}
    has_thresholding = name in ("DDPMScheduler", DPM, "UniPCMultistepScheduler")
    if clip != 1 or not has_thresholding:
        raise ValueError(
            f"diffusers' {name} cannot hold sampler.clip={clip} sampler.quantile={quantile}: take "
            "sampler.clip=null"
        )
    bound = {} if quantile is None else {"dynamic_thresholding_ratio": quantile}
    return {"thresholding": True, "sample_max_value": UNBOUNDED if bound else 1.0, **bound}
