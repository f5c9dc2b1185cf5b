"""AdamW with moments of 8 bits: a quarter of their memory, for networks that hardly fit a GPU."""

from dataclasses import dataclass

import torch
from torch.optim import Optimizer

from ldm.training.optimizers import AdamW

QUANTIZED_PARTS = ("codes", "scale", "qmap", "signed", "dtype")  # of torchao's OptimState8bit


@dataclass(kw_only=True)
class AdamW8bit(AdamW):
    """AdamW whose moments have 8 bits, and a scale for 256 of them (Dettmers et al. 2022).

    Checkpoints hold plain tensors, so that a run is read where torchao is not installed.
    """

    def make_optimizer(self, groups: list[dict]) -> Optimizer:
        from torchao.optim import AdamW8bit as TorchaoAdamW8bit

        optimizer = TorchaoAdamW8bit(groups, lr=self.lr, betas=tuple(self.betas))
        optimizer.register_state_dict_post_hook(unpack_moments)
        optimizer.register_load_state_dict_pre_hook(pack_moments)
        return optimizer


def unpack_moments(optimizer: Optimizer, state_dict: dict) -> dict:
    """Returns a state dict of plain tensors: a quantized moment as a dictionary of its parts."""
    from torchao.optim.subclass_8bit import OptimState8bit

    def unpack(value: object) -> object:
        if not isinstance(value, OptimState8bit):
            return value
        parts = {name: getattr(value, name) for name in QUANTIZED_PARTS}
        return parts | {"dtype": str(value.dtype).removeprefix("torch.")}

    states = state_dict["state"].items()
    return state_dict | {"state": {i: {n: unpack(v) for n, v in of.items()} for i, of in states}}


def pack_moments(optimizer: Optimizer, state_dict: dict) -> dict:
    """Returns a state dict of `unpack_moments` as torchao's optimizer has it."""
    from torchao.optim.subclass_8bit import OptimState8bit

    def pack(value: object) -> object:
        if not isinstance(value, dict):
            return value
        codes, scale, qmap, signed, dtype = (value[name] for name in QUANTIZED_PARTS)
        # The optimizer writes into it, and a checkpoint is a file that is mapped into memory.
        return OptimState8bit(codes.clone(), scale.clone(), qmap, signed, getattr(torch, dtype))

    states = state_dict["state"].items()
    return state_dict | {"state": {i: {n: pack(v) for n, v in of.items()} for i, of in states}}
