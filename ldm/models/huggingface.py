"""Loads models of transformers from a folder or the hub, without code or settings of theirs."""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TypeVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.utils import logging

from ldm.models.diffusers_config import MOST_LAYERS
from ldm.models.diffusers_files import check_weights_finite, list_weight_parts
from ldm.utils.files import read_json_mapping

# Larger numbers of a damaged or hostile file would fill the memory before its weights are read.
MOST_FIELD = 2**20  # such as tokens of a vocabulary
HubModelType = TypeVar("HubModelType", bound=PreTrainedModel)


def load_pretrained_model(
    kind: type[HubModelType],
    location: Path | str,
    *,
    local: bool,
    subfolder: str = "",
    dtype: torch.dtype = torch.float32,
    use_safetensors: bool | None = None,
) -> HubModelType:
    """Loads a model from a folder (`local`) or by its name on the hub; no pickle is executed.

    subfolder: where in it the model is. Raises transformers' own errors where it cannot be read,
    and ValueError where weights are missing or have other shapes than the config.
    """
    folder = Path(location, subfolder)
    config = read_model_config(kind, location, local=local, subfolder=subfolder)
    for index in folder.glob("*.index*.json") if local else ():
        list_weight_parts(index)
    try:
        with silence_transformers():
            model, report = kind.from_pretrained(
                location,
                config=config,
                subfolder=subfolder,
                local_files_only=local,
                trust_remote_code=False,
                weights_only=True,
                variant=find_weights_variant(folder) if local else None,
                use_safetensors=use_safetensors,
                dtype=dtype,
                ignore_mismatched_sizes=True,  # raised below, as transformers' table is silenced
                output_loading_info=True,
            )
    except (UnpicklingError, TypeError, AttributeError, LookupError) as error:
        raise OSError(
            f"the weights in '{folder}' are damaged, or hold more than tensors by name, which "
            f"could run code: they are not opened ({type(error).__name__}). Take the model's "
            ".safetensors"
        ) from error
    # transformers leaves missing weights at random values.
    misfits = report["missing_keys"] | {name for name, *_ in report["mismatched_keys"]}
    if misfits:
        raise ValueError(
            f"the weights in '{location}' are not those of the {kind.__name__} in its config.json: "
            f"{len(misfits)} parameters are missing or of another shape, such as {min(misfits)}"
        )
    check_weights_finite(model.state_dict(), what=str(folder))
    return model


def find_weights_variant(folder: Path) -> str | None:
    """Returns fp16 where a folder holds the weights as this variant alone; else None."""
    names = {path.name for path in folder.iterdir() if path.name.startswith("model.")}
    variants = {"model.fp16.safetensors", "model.safetensors.index.fp16.json"}
    plain = {"model.safetensors", "model.safetensors.index.json"}
    return "fp16" if names & variants and not names & plain else None


def read_model_config(
    kind: type[HubModelType], location: Path | str, *, local: bool, subfolder: str = ""
) -> PreTrainedConfig:
    """Reads a model's config, with only the fields that its kind defines.

    Other fields choose code: `attn_implementation` a kernel of the hub, `quantization_config` a
    library, `transformers_weights` another file.
    Raises OSError and ValueError where there is no config of the kind.
    """
    own, folder = kind.config_class, Path(location, subfolder)
    if local:
        if not (folder / "config.json").is_file():
            raise OSError(f"{folder} has no config.json")
        read_json_mapping(folder / "config.json")  # transformers' errors do not name the file
    config, _ = own.get_config_dict(location, local_files_only=local, subfolder=subfolder)
    if own.base_config_key and own.base_config_key in config:  # one tower of a whole CLIP
        shared = {name: config[name] for name in ("projection_dim",) if name in config}
        config = config[own.base_config_key]
        config = config | shared if isinstance(config, dict) else config
    if isinstance(config, dict) and config.get("use_attention_mask") and "clip" in own.model_type:
        raise ValueError(
            f"the config.json in '{location}' has use_attention_mask=true: prompts without their "
            "padding, which text_encoder=clip never leaves out"
        )
    try:
        fields = _select_fields(own, config)
        _check_fields(fields)
        return own.from_dict(fields)
    except Exception as error:  # the type depends on the version
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"the config.json in '{location}' is of no {kind.__name__}: {why}"
        ) from error


def _select_fields(kind: type[PreTrainedConfig], config: object) -> dict[str, object]:
    if not isinstance(config, dict):
        raise ValueError(f"it is no mapping, but of type {type(config).__name__}")
    parts = dict(kind.sub_configs)
    parts |= {f"{name}_dict": part for name, part in parts.items()}  # the names in older files
    known = {field.name for field in dataclasses.fields(kind)} | {*kind.attribute_map, *parts}
    return {
        name: _select_fields(parts[name], value) if name in parts and value is not None else value
        for name, value in config.items()
        if name in known and not name.startswith("_")
    }


def _check_fields(config: dict[str, object]) -> None:
    """ValueError for what would fill the memory, end in NaN, or is no activation."""
    for name, value in config.items():
        wrong = isinstance(value, float) and not math.isfinite(value)
        if name.endswith("_token_id"):
            wrong = not (value is None or type(value) is int)
        elif type(value) is int:
            is_count = name.startswith("num_") and name.endswith("layers")
            wrong = not 0 <= value <= (MOST_LAYERS if is_count else MOST_FIELD)
        elif name == "hidden_act" and isinstance(value, str):
            wrong = value not in ACT2FN
        elif isinstance(value, dict):
            _check_fields(value)
        if wrong:
            raise ValueError(f"it has {name}={value!r:.80}")


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Hides transformers' progress bars, and its table of weights that half of a CLIP leaves."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
