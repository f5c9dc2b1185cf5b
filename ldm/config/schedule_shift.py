"""`scheduler.shift=auto`: the shift of a run's schedule, from the size of its latents."""

import math

from omegaconf import DictConfig
from torch import nn

from ldm.config.sample_options import print_on_first_rank
from ldm.data.shards.data_sets import list_data_sets
from ldm.diffusion.resolution_shift import compute_shift


def resolve_schedule_shift(cfg: DictConfig, autoencoder: nn.Module) -> None:
    """Sets `scheduler.shift=auto` to the number for `data.size`, which config.yaml then has.

    One number for all sizes of a run: its schedule is stored, sampled and exported as one.
    """
    if cfg.scheduler.get("shift") != "auto":
        return
    frames = (cfg.data.frames,) if cfg.data.get("frames") else ()
    shape = (autoencoder.channels, *frames, *(cfg.data.size // autoencoder.factor,) * 2)
    cfg.scheduler.shift = compute_shift(math.prod(shape), cfg.scheduler.base)
    line = f"scheduler.shift=auto: {cfg.scheduler.shift:.4g}, for latents of "
    line += f"{' x '.join(map(str, shape))}"
    if len(sizes := list_sizes(cfg)) > 1:
        line += (
            f". The data have sizes of {', '.join(map(str, sizes))}: one number serves all, that "
            f"of data.size={cfg.data.size}; give scheduler.shift=NUMBER for another"
        )
    print_on_first_rank(line)


def list_sizes(cfg: DictConfig) -> list[int]:
    """The sizes of the data sets of a run, where they have their own."""
    sizes = {one.size for one in list_data_sets(cfg.data.get("train") or []) if one.size}
    return sorted(sizes)
