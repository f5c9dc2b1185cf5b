"""LoRA: trained adapters of low rank in the layers of a frozen network (peft's layers).

Hu et al. 2021, arXiv:2106.09685.
"""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from ldm.utils.errors import UsageError

ATTENTION_TARGETS = ("to_q", "to_k", "to_v", "to_out")
STAGES = re.compile(
    r"(down|mid|up|blocks)\."
)  # what targets=all means: the first and last layers are not


def add_lora_layers(
    network: nn.Module, *, rank: int, alpha: float, targets: str | Sequence[str]
) -> None:
    """Freezes a network and puts adapters into its layers, which change nothing until trained.

    targets: see `select_lora_targets`.
    """
    from peft import LoraConfig, inject_adapter_in_model  # optional, and slow to import

    names = select_lora_targets(network, targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names)
    inject_adapter_in_model(config, network)


def select_lora_targets(network: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Returns the names of the layers that get an adapter.

    targets: "attention" (the projections of every attention), "all" (every linear and
    convolutional layer of the stages), or patterns such as "to_q" or "mid.*.ff.*", each of which
    stands for the end of a name or for all of it. UsageError for a pattern that fits no layer.
    """
    layers = [n for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    if targets == "all":
        return [name for name in layers if STAGES.match(name)]
    if targets == "attention":
        return [name for name in layers if name.rpartition(".")[2] in ATTENTION_TARGETS]
    found: set[str] = set()
    for pattern in [targets] if isinstance(targets, str) else targets:
        fits = [n for n in layers if fnmatchcase(n, pattern) or fnmatchcase(n, f"*.{pattern}")]
        if not fits:
            ends = sorted({name.rpartition(".")[2] for name in layers} - set("0123456789"))
            raise UsageError(
                f"lora.targets: no layer is called {pattern!r}. Give attention, all, or names that "
                f"end like {', '.join(ends)}"
            )
        found.update(fits)
    return [name for name in layers if name in found]
