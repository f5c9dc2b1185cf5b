"""Weights, averages and optimizer state in one shard per device (torch's fully_shard, FSDP2)."""

from datetime import timedelta
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed import broadcast
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ldm.models.dit_blocks import JointBlock
from ldm.models.layers import ResBlock, SpatialTransformer
from ldm.training.modules.diffusion import LatentDiffusion

# The parts of denoisers whose weights are gathered together.
SHARDED_BLOCKS = (ResBlock, SpatialTransformer, JointBlock)


class FullyShardedStrategy(DDPStrategy):
    """LatentDiffusion with weights, gradients, average and optimizer state divided over devices.

    A block's weights are gathered while it computes. During a validation every device has all of
    the averaged network. Checkpoints are those of any other strategy, so a run may resume with
    another one.
    """

    # Lightning's ModelParallelStrategy shards before it loads, and has its own checkpoint format.
    # Here a whole network is loaded, then sharded, by Lightning's usual code.

    def __init__(self, *, timeout: timedelta = timedelta(minutes=30)) -> None:
        super().__init__(timeout=timeout)
        # The shards of the average, which are set aside during a validation.
        self.parameter_shards: list[tuple[nn.Module, str, nn.Parameter]] = []

    @staticmethod
    def check_module(module: L.LightningModule) -> None:
        """Raises ValueError if the module cannot be trained in shards."""
        if not isinstance(module, LatentDiffusion):
            raise ValueError("strategy=fsdp is for stage=diffusion alone: take strategy=ddp")
        if "loss_raw" in module.val_losses:
            raise ValueError("strategy=fsdp validates the average alone: take validate_raw=false")
        if module.phema is not None:
            raise ValueError(
                "strategy=fsdp keeps no averages for ldm.phema: take phema.lengths=[] or "
                "strategy=ddp"
            )

    def configure_ddp(self) -> None:
        """Shards the module instead of wrapping it for DDP."""
        module = self.lightning_module
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        module.to(memory_format=torch.contiguous_format)  # channels_last cannot be sharded
        for tensor in module.state_dict().values():
            broadcast(tensor, src=0)
        # Autocast would hold its copy of all weights until the backward pass.
        low = torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None
        policy = MixedPrecisionPolicy(
            param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        denoiser, average = module.denoiser, module.ema.module
        blocks = [b for b in denoiser.modules() if isinstance(b, SHARDED_BLOCKS)]
        for part in (*blocks, denoiser):
            fully_shard(part, mesh=mesh, mp_policy=policy)
        weights = dict(denoiser.named_parameters())
        for path, part in average.named_modules():
            for name, value in list(part.named_parameters(recurse=False)):
                shard = shard_tensor(value, like=weights[f"{path}.{name}".lstrip(".")])
                setattr(part, name, nn.Parameter(shard, requires_grad=False))

    def on_validation_start(self) -> None:
        for part in self.lightning_module.ema.modules():
            for name, value in list(part.named_parameters(recurse=False)):
                if isinstance(value, DTensor):
                    self.parameter_shards.append((part, name, value))
                    setattr(part, name, nn.Parameter(value.full_tensor(), requires_grad=False))

    def on_validation_end(self) -> None:
        for part, name, value in self.parameter_shards:
            setattr(part, name, value)
        self.parameter_shards.clear()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns whole tensors on rank 0; all ranks take part."""
        state = super().lightning_module_state_dict()
        return {name: self.gather_full_tensor(value) for name, value in state.items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Returns the state of an optimizer without shards on rank 0; all ranks take part."""
        state = super().optimizer_state(optimizer)
        moments = {
            i: {name: self.gather_full_tensor(value) for name, value in of_one.items()}
            for i, of_one in state["state"].items()
        }
        return {**state, "state": moments}

    def gather_full_tensor(self, value: Tensor) -> Tensor | None:
        """Returns the whole tensor of a shard on the host of rank 0, and None on other ranks."""
        if not isinstance(value, DTensor):
            return value
        full = value.full_tensor()
        return full.cpu() if self.is_global_zero else None

    def load_optimizer_state_dict(self, checkpoint: dict[str, Any]) -> None:
        """Loads the state of an optimizer without shards."""
        states = []
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            moments = {
                i: {
                    name: shard_tensor(value, like=weights[i]) if value.ndim else value
                    for name, value in of_one.items()
                }
                for i, of_one in state["state"].items()
            }
            states.append({**state, "state": moments})
        super().load_optimizer_state_dict({"optimizer_states": states})

    def teardown(self) -> None:
        # Lightning's teardown would move shards to the host, which their mesh does not have.
        for part in (self.cluster_environment, self.precision_plugin, self.accelerator):
            part.teardown()


def shard_tensor(value: Tensor, *, like: DTensor) -> DTensor:
    """Returns this rank's part of a tensor that all ranks have, divided as `like` is."""
    whole = value.detach().contiguous()
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
