"""A network that begins with what a smaller one has learnt.

Shapes: C input channels.
"""

import torch
from torch import Tensor, nn

from ldm.utils.checkpoint_file import CheckpointError

WIDENABLE_WEIGHT = "conv_in.weight"  # (out, C, k, k): the one tensor that may be widened


def warm_start(network: nn.Module, state: dict[str, Tensor], *, source: str) -> list[str]:
    """Load the tensors of another network; afterwards this one's answers are equal to its.

    A first convolution with more input channels than the other's gets zeros for those, so that they
    have no effect at first (Brooks et al. 2023, InstructPix2Pix, arXiv:2211.09800, section 3.2).
    What the other lacks stays as it was built, if its name begins with one of `network.added`,
    the parts that are built without effect. what: the source's name in messages.
    Returns what is new. Raises CheckpointError where the rest differs in name or shape.
    """
    own = network.state_dict()
    wrong = [f"{name} is unknown here" for name in state if name not in own]
    loaded, new = {}, {}
    for name, tensor in own.items():
        given = state.get(name, tensor)
        loaded[name] = given
        if name not in state and name.startswith(tuple(network.extension_prefixes)):
            new[name.split(".")[0]] = None
        elif name not in state:
            wrong.append(f"{name} is missing there")
        elif is_widened(name, given, tensor):
            more = tensor.shape[1] - given.shape[1]
            zeros = given.new_zeros(len(given), more, *given.shape[2:])
            loaded[name] = torch.cat([given, zeros], dim=1)
            new[f"{more} input channels"] = None
        elif given.shape != tensor.shape:
            wrong.append(f"{name} is {tuple(given.shape)} there and {tuple(tensor.shape)} here")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"init={source} is no smaller network of this kind: {'; '.join(wrong[:3])}{more}. "
            "Give the model=.. and its settings that it was trained with"
        )
    network.load_state_dict(loaded)
    return list(new)


def is_widened(name: str, loaded: Tensor, tensor: Tensor) -> bool:
    """Whether a tensor is the first convolution's, and differs in input channels alone, upwards."""
    return (
        name.endswith(WIDENABLE_WEIGHT)
        and loaded.ndim == tensor.ndim
        and loaded.shape[1] < tensor.shape[1]
        and (loaded.shape[0], *loaded.shape[2:]) == (tensor.shape[0], *tensor.shape[2:])
    )
