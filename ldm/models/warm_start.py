"""Initialises a network with the weights of a smaller one."""

import torch
from torch import Tensor, nn

from ldm.utils.checkpoint_file import CheckpointError

WIDENABLE_WEIGHT = "conv_in.weight"  # (out, C, k, k): the only tensor that may be widened


def warm_start(network: nn.Module, state: dict[str, Tensor], *, source: str) -> list[str]:
    """Loads the tensors of a smaller network, so that this one has the same output at first.

    A first convolution with more input channels gets zeros for those (Brooks et al. 2023,
    InstructPix2Pix, arXiv:2211.09800, section 3.2). Other layers may be new if their names begin
    with one of `network.extension_prefixes`. source: in messages.
    Returns the names of what is new. Raises CheckpointError where other names or shapes differ.
    """
    own = network.state_dict()
    wrong = [f"{name} is unknown here" for name in state if name not in own]
    tensors, new = {}, {}
    for name, tensor in own.items():
        loaded = tensors[name] = state.get(name, tensor)
        if name not in state and name.startswith(tuple(network.extension_prefixes)):
            new[name.split(".")[0]] = None
        elif name not in state:
            wrong.append(f"{name} is missing there")
        elif is_widened(name, loaded, tensor):
            more = tensor.shape[1] - loaded.shape[1]
            zeros = loaded.new_zeros(len(loaded), more, *loaded.shape[2:])
            tensors[name] = torch.cat([loaded, zeros], dim=1)
            new[f"{more} input channels"] = None
        elif loaded.shape != tensor.shape:
            wrong.append(f"{name} is {tuple(loaded.shape)} there and {tuple(tensor.shape)} here")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"init={source} is no smaller network of this kind: {'; '.join(wrong[:3])}{more}. "
            "Give the model=.. and its settings that it was trained with"
        )
    network.load_state_dict(tensors)
    return list(new)


def is_widened(name: str, loaded: Tensor, tensor: Tensor) -> bool:
    """Returns whether a first convolution has more input channels, and the same shape otherwise."""
    return (
        name.endswith(WIDENABLE_WEIGHT)
        and loaded.ndim == tensor.ndim
        and loaded.shape[1] < tensor.shape[1]
        and (loaded.shape[0], *loaded.shape[2:]) == (tensor.shape[0], *tensor.shape[2:])
    )
