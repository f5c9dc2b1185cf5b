"""The settings of diffusers' schedulers that we read, with their defaults in diffusers."""

import math
from collections.abc import Mapping, Sequence

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


class SchedulerValues:
    """The values of a scheduler_config.json, with diffusers' defaults; each is taken once."""

    def __init__(self, config: Mapping[str, object]) -> None:
        self.name = str(config.get("_class_name"))
        if self.name not in SCHEDULER_DEFAULTS:
            raise ValueError(
                f"scheduler_config.json is of _class_name={self.name}, which is none of "
                f"{', '.join(SCHEDULER_DEFAULTS)}"
            )
        self.defaults = SCHEDULER_DEFAULTS[self.name]
        self.values = {key: config.get(key, value) for key, value in self.defaults.items()}
        if wrong := [k for k, v in self.values.items() if not is_like_default(v, self.defaults[k])]:
            found = ", ".join(f"{key}={self.values[key]!r:.80}" for key in wrong)
            raise ValueError(
                f"{self.name}: scheduler_config.json has {found}, where diffusers has values such "
                f"as {', '.join(repr(self.defaults[key]) for key in wrong)}"
            )
        self.given = dict(self.values)
        self.unknown = {
            key: value
            for key, value in config.items()
            if not key.startswith("_") and key not in SCHEDULER_KEYS
        }

    def pop(self, key: str, allowed: Sequence[object] | None = None) -> object:
        """The value of a key that is read; the default where it is none of `allowed`, if given.

        Such a value stays, and `check_rest` refuses it.
        """
        if allowed is None or self.values[key] in allowed:
            return self.values.pop(key)
        return self.defaults[key]

    def check_rest(self) -> None:
        """ValueError that names each value that was not read and is not diffusers' default."""
        left = {
            key: value for key, value in self.values.items() if value != self.defaults[key]
        } | self.unknown
        if left:
            found = ", ".join(f"{key}={value!r}" for key, value in left.items())
            raise ValueError(f"{self.name}: of scheduler_config.json we cannot hold {found}")
