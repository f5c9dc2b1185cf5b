"""The adapters of a LoRA run (Hu et al. 2021, arXiv:2106.09685) among the weights of a checkpoint.

peft calls the weight W of an adapted layer `base_layer.weight`, and its adapter A and B
`lora_A.default.weight` and `lora_B.default.weight`. The layer computes W + alpha / rank B A.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

BASE_PART = ".base_layer."
DOWN_SUFFIX, UP_SUFFIX = ".lora_A.default.weight", ".lora_B.default.weight"


def read_lora_scale(facts: Mapping) -> float:
    """Returns alpha / rank by the facts of a checkpoint; ValueError if they do not say it."""
    lora = facts.get("lora")
    numbers = [lora.get(name) for name in ("alpha", "rank")] if isinstance(lora, dict) else [None]
    if not all(type(number) in (int, float) and number > 0 for number in numbers):
        raise ValueError("it has the adapters of a LoRA run, and does not say their alpha and rank")
    return numbers[0] / numbers[1]


def list_adapted_layers(state: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of the layers with an adapter."""
    return [name.removesuffix(DOWN_SUFFIX) for name in state if name.endswith(DOWN_SUFFIX)]


def multiply_adapter(down: Tensor, up: Tensor) -> Tensor:
    """Returns B A in float32: down (r, in, ..), up (out, r, ..) -> (out, in ..), of two dimensions.

    Raises ValueError where the two do not fit.
    """
    down, up = down.flatten(1).float(), up.flatten(1).float()
    if up.shape[1] != len(down):
        raise ValueError(f"an adapter of rank {len(down)} down and {up.shape[1]} up")
    return up @ down


@torch.no_grad()
def merge_adapters(state: Mapping[str, Tensor], facts: Mapping) -> dict[str, Tensor]:
    """Returns the weights of a network with the adapters in them, by the network's own names.

    state: of a LoRA run, or of any other, which comes back as it is. facts: of its checkpoint.
    """
    if not (layers := list_adapted_layers(state)):
        return dict(state)
    scale = read_lora_scale(facts)
    adapters = {name + suffix for name in layers for suffix in (DOWN_SUFFIX, UP_SUFFIX)}
    merged = {n.replace(BASE_PART, "."): t for n, t in state.items() if n not in adapters}
    for name in layers:
        weight = merged.get(f"{name}.weight")
        if weight is None or name + UP_SUFFIX not in state:
            raise ValueError(f"the adapter of {name} is not whole")
        change = multiply_adapter(state[name + DOWN_SUFFIX], state[name + UP_SUFFIX])
        if change.numel() != weight.numel():
            raise ValueError(f"the adapter of {name} does not fit its weight")
        merged[f"{name}.weight"] = torch.add(weight, change.view(weight.shape), alpha=scale)
    return merged
