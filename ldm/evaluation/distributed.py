"""The processes of an evaluation: one, or those of torch.distributed."""

import torch
from torch import Tensor
from torch import distributed as dist


class ProcessGroup:
    """Process `rank` of `world_size`; all processes must call its methods in the same order."""

    def __init__(self) -> None:
        is_group = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if is_group else 0
        self.world_size = dist.get_world_size() if is_group else 1

    def sum(self, table: Tensor) -> Tensor:
        """Returns the sum of a CPU tensor over the processes."""
        if self.world_size == 1:
            return table
        total = table.cuda() if dist.get_backend() == "nccl" else table
        dist.all_reduce(total)
        return total.cpu()

    def any(self, value: bool) -> bool:
        """Returns whether the value is true in any process."""
        return bool(self.sum(torch.tensor(int(value))))

    def share(self, value: object) -> object:
        """Returns the first process's value."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def gather(self, value: object) -> list:
        """Returns the values of all processes, in order of rank, in the first; else nothing."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, values)
        return values or []
