"""The processes that measure together: one, or those of torch.distributed."""

import torch
from torch import Tensor
from torch import distributed as dist


class ProcessGroup:
    """`rank` of `world` processes. Every method but these is to be called by all of them alike."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.world_size = dist.get_world_size() if together else 1

    def sum(self, table: Tensor) -> Tensor:
        """The sum over the processes of a tensor on the host, the same on each."""
        if self.world_size == 1:
            return table
        on = table.cuda() if dist.get_backend() == "nccl" else table
        dist.all_reduce(on)
        return on.cpu()

    def any(self, value: bool) -> bool:
        """Whether any process says so."""
        return bool(self.sum(torch.tensor(int(value))))

    def share(self, value: object) -> object:
        """What the first process gives, on all."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]
