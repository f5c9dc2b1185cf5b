"""Weights, averages and optimizer state in shards, one a device (torch's fully_shard, FSDP2)."""

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

from ldm.models.layers import ResBlock, SpatialTransformer
from ldm.training.modules.diffusion import LatentDiffusion


class FullyShardedStrategy(DDPStrategy):
    """LatentDiffusion with each weight, its gradient, average and optimizer state on one device.

    A block's weights come together while it computes. The averaged network is only stored in
    shards: during a validation every device has all of it, and works by itself. Checkpoints are
    those of any other strategy, so that a run may go on with another one.
    """

    # Lightning's ModelParallelStrategy shards before it loads and has a checkpoint format of its
    # own. Here a whole network is loaded, then sharded, and Lightning's usual path serves.

    def __init__(self, *, timeout: timedelta = timedelta(minutes=30)) -> None:
        super().__init__(timeout=timeout)
        self.parameter_shards: list[
            tuple[nn.Module, str, nn.Parameter]
        ] = []  # shards during a validation

    @staticmethod
    def check(module: L.LightningModule) -> None:
        """Raises ValueError where the module cannot be trained in shards."""
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
        """Shard, in place of wrapping for DDP."""
        module = self.lightning_module
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        module.to(memory_format=torch.contiguous_format)  # channels_last cannot be sharded
        for tensor in module.state_dict().values():
            broadcast(tensor, src=0)
        # Autocast alone would keep its copy of all weights until the backward pass.
        low = torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None
        policy = MixedPrecisionPolicy(
            param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        denoiser, average = module.denoiser, module.ema.module
        blocks = [b for b in denoiser.modules() if isinstance(b, ResBlock | SpatialTransformer)]
        for part in (*blocks, denoiser):
            fully_shard(part, mesh=mesh, mp_policy=policy)
        weights = dict(denoiser.named_parameters())
        for path, part in average.named_modules():
            for name, value in list(part.named_parameters(recurse=False)):
                weight = weights[f"{path}.{name}".lstrip(".")]
                setattr(
                    part, name, nn.Parameter(shard_tensor(value, like=weight), requires_grad=False)
                )

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
        """Whole tensors on rank 0; all ranks take part."""
        state = super().lightning_module_state_dict()
        return {name: self.whole(value) for name, value in state.items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As an optimizer without shards would have it, on rank 0; all ranks take part."""
        state = super().optimizer_state(optimizer)
        moments = {
            i: {name: self.whole(value) for name, value in of_one.items()}
            for i, of_one in state["state"].items()
        }
        return {**state, "state": moments}

    def whole(self, value: Tensor) -> Tensor | None:
        """The tensor that a shard is of, on the host; only rank 0 keeps it."""
        if not isinstance(value, DTensor):
            return value
        full = value.full_tensor()
        if not self.is_global_zero:
            return None
        return full.cpu()

    def load_optimizer_state_dict(self, checkpoint: dict[str, Any]) -> None:
        """From the state of an optimizer without shards."""
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
        # Lightning's would move shards to the host, where their mesh is not.
        for part in (self.cluster_environment, self.precision_plugin, self.accelerator):
            part.teardown()


def shard_tensor(value: Tensor, *, like: DTensor) -> DTensor:
    """This rank's part of a tensor that all ranks have, divided as `like` is."""
    whole = value.detach().contiguous()
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
