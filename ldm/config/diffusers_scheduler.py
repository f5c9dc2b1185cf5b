"""scheduler_config.json of diffusers to scheduler, objective and sampler, and back."""

from collections.abc import Mapping

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from ldm.config.exported_samplers import export_sampler
from ldm.config.published_samplers import SAMPLER_READERS, load_option
from ldm.config.scheduler_defaults import SCHEDULER_DEFAULTS, open_scheduler_config
from ldm.models.diffusers_config import ForeignConfig

PREDICTION_TYPES = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
BETA_SCHEDULES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "cosine",
    "sigmoid": "sigmoid",  # of DDPMScheduler alone
}
TABLE_OPTIONS = ("linear", "scaled_linear", "cosine", "sigmoid", "sigmoid_alpha", "trained_betas")
# Of use_dynamic_shifting.
DYNAMIC_SHIFT_KEYS = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
MOST_TIMESTEPS = 100_000  # a damaged or hostile number would fill the memory
NO_SAMPLE_PREDICTION = (
    *("PNDMScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverSDEScheduler"),
)


def read_scheduler_config(config: Mapping[str, object]) -> dict[str, dict]:
    """The nodes `scheduler`, `objective` and `sampler` of a diffusers scheduler_config.json.

    With them sampling gives the latents of diffusers, from the same noise. Values that have no
    effect there are ignored. ValueError for a class, a key or a value that we cannot hold.
    """
    values = open_scheduler_config(config)
    if values.kind == "FlowMatchEulerDiscreteScheduler":
        values.read_choice("num_train_timesteps", 1000)
        values.ignore(*DYNAMIC_SHIFT_KEYS)
        scheduler = load_option("scheduler", "flow", shift=values.read("shift"))
        grid = {"grid": "euler", "spacing": "linspace"}
        sampler, kind = load_option("sampler", "euler", **grid), "flow"
    else:
        kind = PREDICTION_TYPES[values.read_choice("prediction_type", *PREDICTION_TYPES)]
        scheduler = read_beta_schedule(values)
        sampler = SAMPLER_READERS[values.kind](values, kind)
    values.finish()
    objective = load_option("objective", kind)
    nodes = {"scheduler": scheduler, "objective": objective, "sampler": sampler}
    try:
        for node in (scheduler, sampler):
            instantiate(node)
    except InstantiationException as error:  # such as numbers out of range
        raise ValueError(f"of scheduler_config.json: {error.__cause__ or error}") from error
    return nodes


def change_as_pipeline(config: Mapping[str, object]) -> dict:
    """A scheduler's configuration after the changes that StableDiffusionPipeline makes to it."""
    return {**config, "steps_offset": 1, "clip_sample": False}


def adapt_scheduler_config(config: Mapping[str, object], *, paired: bool) -> dict:
    """A scheduler_config.json that Stable Diffusion's pipeline does not change.

    paired: that of XL, which changes none. ValueError where the change would have an effect.
    """
    changed = config if paired else change_as_pipeline(config)
    changed = {key: value for key, value in changed.items() if key in config}
    if changed.get("clip_sample") != config.get("clip_sample"):
        raise ValueError("sampler.clip (StableDiffusionPipeline switches it off): take none")
    offset = config.get("steps_offset")
    if config.get("timestep_spacing") == "leading" and changed.get("steps_offset") != offset:
        raise ValueError(
            f"sampler.offset={offset} with spacing=leading (StableDiffusionPipeline sets it to 1): "
            "take sampler.offset=1, or spacing=trailing"
        )
    return changed


def read_beta_schedule(values: ForeignConfig) -> dict:
    """The node `scheduler`."""
    steps, start, end = (
        values.read(key) for key in ("num_train_timesteps", "beta_start", "beta_end")
    )
    has_zero_snr = "rescale_betas_zero_snr" in values.values
    zero_snr = values.read("rescale_betas_zero_snr") if has_zero_snr else False
    if steps > MOST_TIMESTEPS:
        raise ValueError(
            f"{values.kind}: num_train_timesteps={steps} is more than {MOST_TIMESTEPS}"
        )
    betas = values.values["trained_betas"]
    values.ignore("trained_betas", *(["beta_schedule"] if betas else []))
    if betas is not None:
        if not isinstance(betas, list) or any(type(each) not in (int, float) for each in betas):
            raise ValueError(f"{values.kind}: trained_betas are no list of numbers")
        if len(betas) != steps:
            raise ValueError(
                f"{values.kind}: {len(betas)} trained_betas do not fit num_train_timesteps={steps}"
            )
        given = {"betas": [float(beta) for beta in betas]}
        return load_option("scheduler", "trained_betas", **given, zero_terminal_snr=zero_snr)
    option = BETA_SCHEDULES[values.read_choice("beta_schedule", *BETA_SCHEDULES)]
    ends = {} if option == "cosine" else {"start": start, "end": end}
    return load_option("scheduler", option, steps=steps, zero_terminal_snr=zero_snr, **ends)


def export_scheduler_config(nodes: Mapping[str, Mapping]) -> dict:
    """The scheduler_config.json of the scheduler and sampler that the nodes describe.

    nodes: `scheduler`, `objective` and `sampler`, as in a run's configuration. ValueError that
    names what diffusers cannot hold, with what to take instead.
    """
    kind = nodes["objective"]["prediction"]["kind"]
    scheduler, sampler = dict(nodes["scheduler"]), dict(nodes["sampler"])
    prediction_type, table = kind_to_prediction_type(kind), export_table(scheduler)
    name, more = export_sampler(sampler, zero_snr=table["rescale_betas_zero_snr"])
    if name == "DDPMScheduler" and scheduler["_target_"].endswith(".sigmoid"):
        ends = {"beta_start": float(scheduler["start"]), "beta_end": float(scheduler["end"])}
        table |= {"beta_schedule": "sigmoid", "trained_betas": None, **ends}
    config = {"prediction_type": prediction_type, **table}
    check_exported(name, config, kind)
    if name == "PNDMScheduler" and sampler.get("average", "eps") != kind:
        raise ValueError(
            f"diffusers' {name} averages what the network predicts: take sampler.average={kind}"
        )
    known = SCHEDULER_DEFAULTS[name]
    config = {key: value for key, value in {**config, **more}.items() if key in known}
    return {"_class_name": name, **known, **config}


def kind_to_prediction_type(kind: str) -> str:
    """diffusers' name of what the network predicts; ValueError for flow."""
    names = {each: name for name, each in PREDICTION_TYPES.items()}
    if kind not in names:
        raise ValueError(f"diffusers cannot hold objective={kind}: train with objective=v, eps, x0")
    return names[kind]


def check_exported(name: str, config: Mapping[str, object], kind: str) -> None:
    """ValueError where a scheduler of diffusers does not have this table or prediction."""
    if kind == "x0" and name in NO_SAMPLE_PREDICTION:
        raise ValueError(f"diffusers' {name} cannot hold objective=x0: take sampler=ddim or euler")
    if (
        config["rescale_betas_zero_snr"]
        and "rescale_betas_zero_snr" not in SCHEDULER_DEFAULTS[name]
    ):
        raise ValueError(
            f"diffusers' {name} cannot hold scheduler.zero_terminal_snr=true: take sampler=ddim, "
            "or sampler=euler sampler.grid=euler"
        )


def export_table(scheduler: Mapping[str, object]) -> dict:
    """The keys of a table of betas: by name where diffusers has it, else its numbers."""
    option = str(scheduler["_target_"]).rpartition(".")[2]
    steps = scheduler.get("steps", 1000)
    shared = {
        "num_train_timesteps": steps,
        "rescale_betas_zero_snr": bool(scheduler.get("zero_terminal_snr", False)),
    }
    defaults = load_option("scheduler", option) if option in TABLE_OPTIONS else None
    if defaults is None:
        raise ValueError(
            f"diffusers cannot hold scheduler={option}: its network gets other timesteps than a "
            f"table of betas has. Train with scheduler={', '.join(TABLE_OPTIONS)}"
        )
    node = {**defaults, **scheduler}
    if option in ("linear", "scaled_linear"):
        ends = {"beta_start": float(node["start"]), "beta_end": float(node["end"])}
        return {**shared, "beta_schedule": option, **ends}
    if option == "cosine" and (node["offset"], node["max_beta"]) == (0.008, 0.999):
        return {**shared, "beta_schedule": "squaredcos_cap_v2"}
    betas = node.get("betas") or compute_betas({**node, "zero_terminal_snr": False})
    return {**shared, "num_train_timesteps": len(betas), "trained_betas": [*betas]}


def compute_betas(node: Mapping[str, object]) -> list[float]:
    """The betas of a node `scheduler`."""
    table = instantiate(dict(node)).log_alpha_bar
    return (-(table.diff().expm1())).tolist()
