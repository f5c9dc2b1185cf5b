"""Where the time of a training step goes, and how much of the device's peak it uses."""

import re
import time
from collections import defaultdict
from copy import copy

import torch
from torch import Tensor, nn

from ldm.diffusion.conditioning import Condition

# Dense TFLOP/s of one device, by a pattern for its name: in bfloat16 or float16 with float32 sums,
# and in float32 (TF32 where the device has it). From NVIDIA's data sheets and architecture papers,
# which also give sparse values, twice as high. The first that fits counts.
PEAK_TFLOPS = {
    "B200": (2250, 1125),
    "GH200": (989, 494),
    "H200": (989, 494),
    "H100 NVL": (835, 417),
    "H100 PCIe": (756, 378),
    "H100": (989, 494),
    "A100": (312, 156),
    "A10G": (70, 35),
    "A10": (125, 62.5),
    "L40S": (362, 183),
    "L40": (181, 90.5),
    "L4": (121, 60.5),
    "RTX 4090$": (165, 82.6),
    "RTX 3090$": (71, 35.6),
    "V100": (125, 15.7),
    "T4": (65, 8.1),
}


class StepClock:
    """The time of each part of one step, on the device's own time line; nothing waits for it.

    It runs from `start` to `read_shares`; `mark` ends a part, which began at the mark before.
    """

    def __init__(self) -> None:
        self.runs = False
        self.marks: list[tuple[str, float | torch.cuda.Event]] = []

    def start(self, device: torch.device) -> None:
        """Begins to measure."""
        self.on_gpu = device.type == "cuda"
        self.runs, self.marks = True, []
        self.mark("")

    def stop(self) -> None:
        """Forgets what was measured."""
        self.runs, self.marks = False, []

    def mark(self, part: str) -> None:
        """Ends a part of the step; several parts of one name are added."""
        if not self.runs:
            return
        now: float | torch.cuda.Event = time.perf_counter()
        if self.on_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.marks.append((part, now))

    def read_shares(self) -> dict[str, float]:
        """Returns the share of each part, and stops; the device must have reached the last mark."""
        spent: dict[str, float] = defaultdict(float)
        for (_, began), (part, ended) in zip(self.marks, self.marks[1:], strict=False):
            spent[part] += began.elapsed_time(ended) if self.on_gpu else ended - began
        self.stop()
        total = sum(spent.values())
        return {part: seconds / total for part, seconds in spent.items()} if total > 0 else {}


def find_peak_tflops(device: torch.device, precision: str) -> float | None:
    """Returns the dense peak of a device in a precision of Lightning's; None for one not known."""
    if device.type != "cuda" or "64" in precision:
        return None
    name = torch.cuda.get_device_name(device)
    found = (peaks for part, peaks in PEAK_TFLOPS.items() if re.search(rf"\b{part}\b", name))
    peaks = next(found, None)
    return None if peaks is None else float(peaks["32" in precision])


def count_forward_flops(net: nn.Module, x: Tensor, t: Tensor, cond: Condition) -> int:
    """Returns the FLOPs of net(x, t, cond); only shapes are computed."""
    # Imported here, because they import the compiler.
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    def fake(value: Tensor) -> Tensor:
        # Of one dtype, as nothing casts them here.
        dtype = torch.float32 if value.is_floating_point() else value.dtype
        return torch.empty(value.shape, dtype=dtype, device=x.device)

    tensors = (*net.named_parameters(), *net.named_buffers())
    # Attention as two products, because not every kernel of it is counted.
    with (
        torch.no_grad(),
        FakeTensorMode(allow_non_fake_inputs=True),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        state = {name: fake(value) for name, value in tensors}
        # A copy is not compiled, and a compiled call is not counted.
        torch.func.functional_call(copy(net), state, (fake(x), fake(t), cond.map(fake)))
    return counter.get_total_flops()
