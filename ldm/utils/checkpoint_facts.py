"""What a checkpoint holds and says of itself, looked at before anything relies on it."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ldm.utils.checkpoint_file import CheckpointError


def read_state_dict(payload: object, path: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint by name; CheckpointError where it has none, or other things."""
    state = payload.get("state_dict") if isinstance(payload, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path} has no weights in it, and is no checkpoint of ours. Take the file that "
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
    """What a checkpoint says of itself: stage, config and the digests of its frozen parts.

    Raises CheckpointError where it says less, or its weights or its step are none.
    """
    read_state_dict(payload, path)
    said = payload.get("ldm")
    step, stage = payload.get("global_step"), said.get("stage") if isinstance(said, dict) else None
    if not isinstance(stage, str) or not stage.isidentifier() or "config" not in said:
        raise CheckpointError(
            f"{path} does not say what it was trained as. Take the file that train.py wrote"
        )
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**63:
        raise CheckpointError(f"{path} is damaged: its step is {step!r:.80}, which is no number")
    if not isinstance(said.get("frozen"), dict):
        raise CheckpointError(f"{path} is damaged: it does not say which frozen parts it rests on")
    return said


def check_frozen_digests(metadata: dict, path: Path, names: Iterable[str]) -> None:
    """CheckpointError where a checkpoint has no digest of one of its frozen parts."""
    for name in names:
        if not isinstance(metadata["frozen"].get(name), str):
            raise CheckpointError(
                f"{path} is damaged: it does not say which {name} it was trained with"
            )
