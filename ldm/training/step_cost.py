"""The FLOPs and the memory of a training step, from shapes alone: networks on torch's meta device.

A mode of functions does what autocast does on a GPU, and takes its fused attention. The memory is
that of the tensors that live at a time: allocators and libraries take some more.
"""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.diffusion.conditioning import Condition

# The functions that autocast runs in half precision, and in float32: of those that networks use.
HALF_FUNCTIONS = (
    *(F.linear, F.conv1d, F.conv2d, F.conv3d, torch.bmm, torch.baddbmm, torch.matmul),
    *(torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.bmm),
)
FLOAT_FUNCTIONS = (F.group_norm, F.layer_norm, F.softmax, torch.softmax, torch.Tensor.softmax)


@dataclass(frozen=True)
class StepCost:
    """What one micro-step of one device takes; FLOPs of the backward pass with recomputation."""

    encoder_flops: int
    forward_flops: int
    backward_flops: int
    encoder_bytes: int  # the most at a time, with the latents and text states
    activation_bytes: int  # from the forward to the backward pass
    backward_bytes: int  # the most at a time, with the gradients

    @property
    def flops(self) -> int:
        """Those of all parts."""
        return self.encoder_flops + self.forward_flops + self.backward_flops


class StepFunctions(TorchFunctionMode):
    """Autocast to `half` (None: no autocast) and the fused attention of a GPU, on any device."""

    def __init__(self, half: torch.dtype | None) -> None:
        super().__init__()
        self.half, self.is_on = half, False

    def wrap(self, forward: Callable) -> Callable:
        """Returns a function that calls `forward` in this mode."""

        def run(*args, **kwargs):
            if self.is_on:
                return forward(*args, **kwargs)
            self.is_on = True
            try:
                with self:
                    return forward(*args, **kwargs)
            finally:
                self.is_on = False

        return run

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if self.half is not None and func in HALF_FUNCTIONS:
            args, kwargs = _cast((args, kwargs), self.half)
        elif self.half is not None and func in FLOAT_FUNCTIONS:
            args, kwargs = _cast((args, kwargs), torch.float32)
        return func(*args, **kwargs)

    def _attend(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **more):
        if self.half is not None:
            q, k, v = _cast((q, k, v), self.half)
        fused = torch.ops.aten._scaled_dot_product_efficient_attention
        return fused(q, k, v, None, q.requires_grad, dropout_p, is_causal)[0]


def _cast(values, dtype: torch.dtype):
    """The tensors of nested tuples and mappings in a dtype, those that are floating point."""
    if isinstance(values, Tensor):
        return values.to(dtype) if values.is_floating_point() else values
    if isinstance(values, tuple | list):
        return type(values)(_cast(each, dtype) for each in values)
    if isinstance(values, dict):
        return {name: _cast(each, dtype) for name, each in values.items()}
    return values


class StepMeter(TorchDispatchMode):
    """The FLOPs of what runs in this context, and the bytes of the tensors that it made.

    live: of those that still exist; peak: the most at a time. (FlopCounterMode also looks at
    modules, and thereby holds what checkpointed blocks compute again.)
    """

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # imports the compiler

        super().__init__()
        self.formulas = flop_registry
        self.flops = self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for each in _tensors((args, kwargs)):  # also those from before, which are not counted
            self.known.add(each.untyped_storage()._cdata)
        out = func(*args, **kwargs)
        if (count := self.formulas.get(func.overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        for each in _tensors(out):
            self._add(each.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def _tensors(values) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for each in values:
            yield from _tensors(each)
    elif isinstance(values, dict):
        yield from _tensors(tuple(values.values()))


def count_step_cost(
    denoiser: nn.Module,
    encode: Callable[[], object],
    x0: Tensor,
    cond: Condition,
    *,
    half: torch.dtype | None,
) -> StepCost:
    """Counts a step of a denoiser on latents x0 (B, C, h, w); all on the meta device.

    The denoiser cannot be used afterwards.
    encode: what makes latents; half: the dtype of autocast, None without it.
    """
    functions = StepFunctions(half)
    with functions, StepMeter() as encoders, torch.no_grad():
        encode()
    # Each layer by itself: `backward` leaves a mode, and checkpointed blocks run again inside it.
    for layer in denoiser.modules():
        layer.forward = functions.wrap(layer.forward)
    t = torch.zeros(len(x0), device=x0.device)
    with StepMeter() as meter:
        loss = F.mse_loss(denoiser(x0, t, cond).float(), x0)
        forward, stored, meter.peak = meter.flops, meter.live, meter.live
        loss.backward()
    backward = meter.flops - forward
    return StepCost(encoders.flops, forward, backward, encoders.peak, stored, meter.peak)
