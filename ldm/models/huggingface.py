"""Models of transformers, from a folder or the hub."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

HubModelType = TypeVar("Model", bound=PreTrainedModel)


def load_pretrained_model(
    kind: type[HubModelType],
    location: Path | str,
    *,
    local: bool,
    dtype: torch.dtype = torch.float32,
    use_safetensors: bool | None = None,
) -> HubModelType:
    """A model of a folder (`local`), or by its name on the hub; no pickle is executed.

    Of its config.json the sizes count alone: how it computes, and where from, is not the file's.
    Raises what transformers raises where it cannot be read, and ValueError where weights are
    missing or of other shapes than the config says.
    """
    with silence_transformers():
        model, report = kind.from_pretrained(
            location,
            config=read_model_config(kind, location, local=local),
            local_files_only=local,
            trust_remote_code=False,
            weights_only=True,
            use_safetensors=use_safetensors,
            dtype=dtype,
            ignore_mismatched_sizes=True,  # told below: transformers tells in the silenced table
            output_loading_info=True,
        )
    # transformers leaves what the file lacks at random values.
    misfits = report["missing_keys"] | {name for name, *_ in report["mismatched_keys"]}
    if misfits:
        raise ValueError(
            f"the weights in '{location}' are not those of the {kind.__name__} in its config.json: "
            f"{len(misfits)} parameters are missing or of another shape, such as {min(misfits)}"
        )
    return model


def read_model_config(
    kind: type[HubModelType], location: Path | str, *, local: bool
) -> PreTrainedConfig:
    """The config of a model, with the fields that its kind has, and no others of the file.

    Others choose code: `attn_implementation` a kernel of the hub that is fetched and run,
    `quantization_config` a library, `transformers_weights` another file.
    Raises OSError and ValueError where there is no config of the kind.
    """
    own = kind.config_class
    found, _ = own.get_config_dict(location, local_files_only=local)
    if own.base_config_key and own.base_config_key in found:  # one tower of a whole CLIP
        found = found[own.base_config_key]
    try:
        return own.from_dict(_fields(own, found))
    except Exception as error:  # of other types from version to version
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"the config.json in '{location}' is of no {kind.__name__}: {why}"
        ) from error


def _fields(kind: type[PreTrainedConfig], found: object) -> dict[str, object]:
    if not isinstance(found, dict):
        raise ValueError(f"it is no mapping, but of type {type(found).__name__}")
    parts = dict(kind.sub_configs)
    parts |= {f"{name}_dict": part for name, part in parts.items()}  # so older files have them
    known = {field.name for field in dataclasses.fields(kind)} | {*kind.attribute_map, *parts}
    return {
        name: _fields(parts[name], value) if name in parts and value is not None else value
        for name, value in found.items()
        if name in known and not name.startswith("_")
    }


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Without transformers' bars, and its table of weights that one half of a CLIP does not use."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
