"""torch.compile for denoisers: one graph for all batch sizes of a run."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._dynamo import maybe_mark_dynamic
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from ldm.diffusion.conditioning import Condition
from ldm.models.random_layers import Dropout
from ldm.utils.errors import UsageError


class CompiledCall:
    """The compiled calls of a network, which `nn.Module` makes in place of its own.

    default: one graph for all batch sizes above 1. reduce-overhead: a CUDA graph for each size,
    because a CUDA graph has fixed sizes; the output is copied, as the next call overwrites it.
    """

    def __init__(
        self, network: nn.Module, mode: str, backend: str, report: Callable[[str], object]
    ) -> None:
        self.network, self.mode, self.report = network, mode, report
        self.has_fixed_sizes = mode == "reduce-overhead"
        self.start: float | None = None  # of the first call, until the second one
        self.calls = 0
        self.compiled = torch.compile(
            network._call_impl,
            fullgraph=True,
            dynamic=False if self.has_fixed_sizes else None,
            backend=backend,
            mode=mode if backend == "inductor" else None,
        )

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        if self.calls < 2:
            self._report_time()
        t = t.expand(len(x)).contiguous()  # () and (B,) share a graph
        if not self.has_fixed_sizes:
            for part in (x, t, *cond.parts()):
                if part is not None:
                    maybe_mark_dynamic(part, 0)
        try:
            out = self.compiled(x, t, cond)
        except FailOnRecompileLimitHit:
            self.network._compiled_call_impl = None
            self.report(f"compile={self.mode}: the inputs have too many shapes: it goes on without")
            return self.network(x, t, cond)
        except TorchDynamoException as error:
            self.network._call_impl(x, t, cond)  # raises the errors that are not of the compiler
            name, reason = type(self.network).__name__, str(error).strip().splitlines()[0]
            raise UsageError(
                f"compile={self.mode}: torch cannot compile {name} ({reason}): give compile=off"
            ) from error
        return out.clone() if self.has_fixed_sizes else out

    def _report_time(self) -> None:
        self.calls += 1
        name = type(self.network).__name__
        if self.calls == 1:
            self.start = time.perf_counter()
            slow = "" if next(self.network.parameters()).is_cuda else " (it takes minutes on a CPU)"
            self.report(f"compile={self.mode}: the first step compiles {name}{slow}")
        else:
            seconds = time.perf_counter() - self.start
            self.report(f"compile={self.mode}: the first step of {name} took {seconds:.1f} s")


def compile_network(
    network: nn.Module,
    mode: str,
    *,
    report: Callable[[str], object] = print,
    backend: str = "inductor",
) -> None:
    """Has the calls of a network compiled; its state dict and its copies are those of before.

    mode: "default" or "reduce-overhead", of torch.compile. report: receives a line where the
    compilation begins, and one with the time that it took. Raises UsageError for a network that
    draws random numbers, and, in its first call, for one that cannot be compiled as one graph.
    """
    if network.training and any(isinstance(m, Dropout) and m.p for m in network.modules()):
        raise UsageError(
            f"compile={mode}: dropout draws numbers of each image, outside of a graph: give "
            "model.dropout=0 or compile=off"
        )
    # `_compiled_call_impl` is private (torch 2.1 to 2.13). `network.compile()` sets it as well, and
    # takes no function of ours, which must mark the batch dimension of every input as dynamic.
    network._compiled_call_impl = CompiledCall(network, mode, backend, report)
