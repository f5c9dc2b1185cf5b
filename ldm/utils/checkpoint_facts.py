"""Checks the content of an untrusted checkpoint: weights, step, stage and configuration."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ldm.utils.checkpoint_file import CheckpointError


def read_state_dict(payload: object, path: Path) -> dict[str, Tensor]:
    """Returns the weights of a checkpoint by name; CheckpointError if they are no plain tensors."""
    state = payload.get("state_dict") if isinstance(payload, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path} has no weights in it, and is no checkpoint of ldm. Take the file that "
            "train.py wrote"
        )
    for name, tensor in state.items():
        plain = isinstance(name, str) and name.isprintable() and isinstance(tensor, Tensor)
        if not plain or tensor.layout is not torch.strided or tensor.is_quantized:
            raise CheckpointError(f"{path} is damaged: {name!r:.99} among its weights is no tensor")
        if tensor.device.type != "cpu":
            raise CheckpointError(f"{path} is damaged: {name!r} has a shape and no values")
    return state


def read_checkpoint_metadata(payload: object, path: Path) -> dict:
    """Returns stage, config and digests of the frozen parts; CheckpointError if one is damaged."""
    read_state_dict(payload, path)
    facts, step = payload.get("ldm"), payload.get("global_step")
    stage = facts.get("stage") if isinstance(facts, dict) else None
    if not isinstance(stage, str) or not stage.isidentifier() or "config" not in facts:
        raise CheckpointError(
            f"{path} does not say what it was trained as. Take the file that train.py wrote"
        )
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**63:
        raise CheckpointError(f"{path} is damaged: its step is {step!r:.80}, which is no number")
    if not isinstance(facts.get("frozen"), dict):
        raise CheckpointError(f"{path} is damaged: it does not say which frozen parts it rests on")
    return facts


def check_frozen_digests(metadata: dict, path: Path, names: Iterable[str]) -> None:
    """Raises CheckpointError if the digest of one of these frozen parts is missing."""
    for name in names:
        if not isinstance(metadata["frozen"].get(name), str):
            raise CheckpointError(
                f"{path} is damaged: it does not say which {name} it was trained with"
            )
