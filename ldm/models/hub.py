"""Models of transformers, from a folder or the hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

Model = TypeVar("Model", bound=PreTrainedModel)


def pretrained(
    kind: type[Model],
    place: Path | str,
    *,
    local: bool,
    dtype: torch.dtype = torch.float32,
    use_safetensors: bool | None = None,
) -> Model:
    """A model of a folder (`local`), or by its name on the hub; no pickle is executed.

    Raises what transformers raises where it cannot be read, and ValueError where weights are
    missing or of other shapes than the config says.
    """
    with quiet():
        model, report = kind.from_pretrained(
            place,
            local_files_only=local,
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
            f"the weights in '{place}' are not those of the {kind.__name__} in its config.json: "
            f"{len(misfits)} parameters are missing or of another shape, such as {min(misfits)}"
        )
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars, and its table of weights that one half of a CLIP does not use."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
