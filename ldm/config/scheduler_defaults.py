"""The settings of diffusers' schedulers that we read, with their defaults in diffusers."""

import math
from collections.abc import Mapping

from ldm.models.diffusers_config import ForeignConfig

_TABLE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 0,
}
_STABLE_DIFFUSION_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_LINSPACE = {"timestep_spacing": "linspace"}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_THRESHOLDING = {
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}
_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_SIGMA_BOUNDS = {"sigma_min": None, "sigma_max": None}
_SHIFTING = {"use_dynamic_shifting": False, "time_shift_type": "exponential"}
_SOLVER = {
    **(_TABLE | _LINSPACE | _ZERO_SNR | _THRESHOLDING | _SIGMAS | _SHIFTING),
    "solver_order": 2,
    "lower_order_final": True,
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "final_sigmas_type": "zero",
}
# The defaults of diffusers 0.42; a test compares them with its signatures.
SCHEDULER_DEFAULTS = {
    "DDIMScheduler": {**(_TABLE | _CLIP | _THRESHOLDING | _ZERO_SNR), "set_alpha_to_one": True},
    "DDPMScheduler": {
        **(_TABLE | _CLIP | _THRESHOLDING | _ZERO_SNR),
        "variance_type": "fixed_small",
    },
    "PNDMScheduler": {**_TABLE, "skip_prk_steps": False, "set_alpha_to_one": False},
    "LCMScheduler": {
        **(_TABLE | _STABLE_DIFFUSION_BETAS | _CLIP | _THRESHOLDING | _ZERO_SNR),
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "original_inference_steps": 50,
        "timestep_scaling": 10.0,
    },
    "EulerDiscreteScheduler": {
        **(_TABLE | _LINSPACE | _SIGMAS | _SIGMA_BOUNDS | _ZERO_SNR),
        "interpolation_type": "linear",
        "timestep_type": "discrete",
        "final_sigmas_type": "zero",
    },
    "EulerAncestralDiscreteScheduler": _TABLE | _LINSPACE | _ZERO_SNR,
    "HeunDiscreteScheduler": {
        **(_TABLE | _LINSPACE | _STABLE_DIFFUSION_BETAS | _SIGMAS | _CLIP),
        "clip_sample": False,
    },
    "DPMSolverSDEScheduler": {
        **(_TABLE | _LINSPACE | _STABLE_DIFFUSION_BETAS | _SIGMAS),
        "noise_sampler_seed": None,
    },
    "DPMSolverMultistepScheduler": {
        **_SOLVER,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "lambda_min_clipped": float("-inf"),
        "variance_type": None,
    },
    "UniPCMultistepScheduler": {
        **(_SOLVER | _SIGMA_BOUNDS),
        "predict_x0": True,
        "solver_type": "bh2",
        "disable_corrector": [],
        "solver_p": None,
        "shift_terminal": None,
    },
    "FlowMatchEulerDiscreteScheduler": {
        **(_SIGMAS | _SHIFTING),
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "invert_sigmas": False,
        "shift_terminal": None,
        "stochastic_sampling": False,
    },
}
# All known keys: diffusers ignores those of other classes.
SCHEDULER_KEYS = frozenset().union(*SCHEDULER_DEFAULTS.values())


def is_like_default(value: object, default: object) -> bool:
    """Whether a value may stand where a default is: a number for a number, and so on."""
    if default is None or isinstance(default, list) or value == default:
        return True
    if type(default) in (int, float):
        return type(value) in (int, float) and math.isfinite(value)
    return value is None or type(value) is type(default)


def open_scheduler_config(config: Mapping[str, object]) -> ForeignConfig:
    """A scheduler_config.json to be read; ValueError for another class, or a value of no sense."""
    name = str(config.get("_class_name"))
    if name not in SCHEDULER_DEFAULTS:
        raise ValueError(
            f"scheduler_config.json is of _class_name={name}, which is none of "
            f"{', '.join(SCHEDULER_DEFAULTS)}"
        )
    defaults = SCHEDULER_DEFAULTS[name]
    given = {key: config.get(key, value) for key, value in defaults.items()}
    if wrong := [key for key, value in given.items() if not is_like_default(value, defaults[key])]:
        found = ", ".join(f"{key}={given[key]!r:.80}" for key in wrong)
        raise ValueError(
            f"{name}: scheduler_config.json has {found}, where diffusers has values such as "
            f"{', '.join(repr(defaults[key]) for key in wrong)}"
        )
    notes = {key for key in config if key.startswith("_")}
    harmless = (SCHEDULER_KEYS | notes) - defaults.keys()
    return ForeignConfig(config, defaults, kind=name, harmless=harmless, file="scheduler_config")
