"""Muon for the matrices inside a network, and AdamW for its other weights."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ldm.models.fused_linear import FusedLinear
from ldm.training.optimizers import AdamW, NetworkParameters, group_by_decay, match_memory_layout

# Layers that read or write what is outside of a network, and embeddings of time and text. So do
# those that are direct parts of a network.
ENDS = re.compile(
    r"(^|\.)(conv_in|conv_out|time_mlp|pooled_mlp|(post_)?quant_conv|patch_embedding|"
    r"text_projection|visual_projection|tower\.proj_out)(\.|$)"
)
COEFFICIENTS = (3.4445, -4.775, 2.0315)  # of Jordan et al. 2024
NEWTON_SCHULZ_STEPS = 5
BATCH_ELEMENTS = 2**26  # of matrices that are made orthogonal at a time: 128 MiB


@dataclass(kw_only=True)
class Muon(AdamW):
    """Muon with AdamW's schedule; the size of an update is AdamW's, and so are `lr` and decay.

    "Muon: An optimizer for hidden layers in neural networks", Jordan et al. 2024; "Muon is scalable
    for LLM training", Liu et al. 2025, section 2.2. Convolutions are matrices (out, rest), and
    layers that hold several maps (FusedLinear) are as many matrices.

    adamw_lr: of the weights that AdamW trains: first and last layers, embeddings, biases, gains.
    """

    momentum: float = 0.95
    adamw_lr: float | None = None

    def make_groups(self, parameters: Iterable[nn.Parameter]) -> list[dict]:
        """Returns the group of Muon's weights, then those of AdamW's."""
        if not isinstance(parameters, NetworkParameters):
            raise TypeError("Muon needs the names of the weights: give NetworkParameters(network)")
        parts = find_matrices(parameters.network)
        trained = [p for p in parameters if p.requires_grad]
        others = group_by_decay([p for p in trained if p not in parts], self.weight_decay)
        lr = self.lr if self.adamw_lr is None else self.adamw_lr
        matrices = {
            "params": list(parts),
            "parts": list(parts.values()),
            "lr": self.lr,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
        }
        return [matrices, *({**group, "lr": lr} for group in others)]

    def make_optimizer(self, groups: list[dict]) -> Optimizer:
        """Returns the optimizer of the groups of `make_groups`."""
        optimizer = MuonAdamW(*groups, betas=tuple(self.betas))
        optimizer.register_load_state_dict_post_hook(match_memory_layout)
        return optimizer


def find_matrices(network: nn.Module) -> dict[nn.Parameter, int]:
    """The trained weights that Muon moves, and the number of matrices in each of them."""
    return {
        layer.weight: layer.parts if isinstance(layer, FusedLinear) else 1
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
        and layer.weight.requires_grad
        and "." in name
        and not ENDS.search(name)
    }


class MuonAdamW(Optimizer):
    """One optimizer, with one state dict, whose first group Muon moves and AdamW the others."""

    def __init__(self, matrices: dict, *others: dict, betas: tuple[float, float]) -> None:
        self.adamw = torch.optim.AdamW(others or [{"params": []}], betas=betas, fused=True)
        # Fused: a step that is to be left out gets `found_inf`, and nothing waits for the device.
        super().__init__([matrices, *self.adamw.param_groups], {"fused": True})
        self.found_inf: Tensor | None = None  # (): 1.0 where a gradient is not finite
        self.register_load_state_dict_post_hook(MuonAdamW.share_state)
        self.share_state()

    def share_state(self) -> None:
        """Has AdamW work on the groups and the state of this optimizer."""
        self.adamw.param_groups, self.adamw.state = self.param_groups[1:], self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Takes a step, and none where `found_inf` is 1."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.adamw.found_inf = self.found_inf
        self.adamw.step()
        group, batches = self.param_groups[0], defaultdict(list)
        for weight, parts in zip(group["params"], group["parts"], strict=True):
            if weight.grad is not None:
                batches[weight.shape, parts].append(weight)
        for (shape, parts), weights in batches.items():
            size = max(1, BATCH_ELEMENTS // shape.numel())
            for start in range(0, len(weights), size):
                self.move_matrices(weights[start : start + size], parts, group)
        return loss

    def move_matrices(self, weights: list[nn.Parameter], parts: int, group: dict) -> None:
        """Moves weights of one shape."""
        momentum, found_inf = group["momentum"], self.found_inf
        keep = weights[0].new_ones(())
        if found_inf is not None:
            keep -= found_inf
        updates = []
        for weight in weights:
            gradient, state = weight.grad, self.state[weight]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(weight)
            mean = state["momentum_buffer"]
            if found_inf is not None:  # then neither the mean nor the weight changes
                gradient = torch.where(found_inf.bool(), mean, gradient)
            mean.lerp_(gradient, 1 - momentum)
            update = gradient.lerp(mean, momentum)  # Nesterov's
            updates.append(update.flatten(1).unflatten(0, (parts, -1)).bfloat16())
        matrices = torch.stack(updates)  # (weights, parts, rows, columns)
        scale = -group["lr"] * 0.2 * max(matrices.shape[-2:]) ** 0.5 * keep
        decay = 1.0 - group["lr"] * group["weight_decay"] * keep
        matrices = orthogonalize(matrices.flatten(0, 1)).unflatten(0, (-1, parts))
        for weight, update in zip(weights, matrices, strict=True):
            weight.mul_(decay).addcmul_(update.reshape(weight.shape).to(weight.dtype), scale)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Matrices (N, A, B) with the same singular vectors, and singular values near 1.

    The quintic Newton-Schulz iteration of Jordan et al. 2024, as torch.optim.Muon has it: five
    steps, after which they are between 0.7 and 1.2.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
