"""`ldm train ... plan=true`: what a run takes, counted from shapes before anything runs.

Nothing is downloaded, written or sent to a device.
"""

import json
import math
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ldm.config.adoption import adopt_published_groups
from ldm.config.cache_settings import is_cached, list_caches, open_training_cache
from ldm.config.command_line import convert_to_usage_errors
from ldm.config.components import choose_precision
from ldm.config.counted_parts import (
    TextSizes,
    count_autoencoder,
    count_denoiser,
    count_parameters,
    count_text_encoder,
    make_step_inputs,
)
from ldm.config.plan_table import PlanTable, format_plan
from ldm.config.reserved_settings import ADAMW_8BIT_TARGET, MUON_TARGET
from ldm.config.training_checks import (
    check_buckets,
    check_data_kind,
    check_data_sets,
    check_image_size,
    check_strategy,
)
from ldm.data.position_sampler import split_batch
from ldm.data.shards.data_sets import list_locations
from ldm.data.shards.index import ReadOptions, open_index
from ldm.data.shards.locations import is_url
from ldm.experiments.run_dir import get_launcher_rank
from ldm.training.step_clock import PEAK_TFLOPS, find_peak_tflops
from ldm.training.step_cost import StepCost, count_step_cost
from ldm.utils.errors import UsageError

# Mosaic's Stable Diffusion 2 reached 24 % to 28 % of an A100 (mosaicml/diffusion, README).
UTILISATION = 0.25
SHOWN_DEVICES = ("A100", "H100", "RTX 4090$")  # where the peak of the device is not known
MEMBER_BYTES = 1024  # of a tar member: its header, and zeros up to a multiple of 512


@dataclass(frozen=True)
class PlannedRun:
    """The numbers that the settings give; micro: images of one device and micro-step."""

    world: int
    micro: int
    accumulate: int
    steps: int
    batch: int
    precision: str

    @property
    def half(self) -> torch.dtype | None:
        """The dtype of autocast; None without it."""
        return torch.bfloat16 if self.precision.endswith("mixed") else None

    @property
    def weight_bytes(self) -> int:
        """Of one weight."""
        name = self.precision
        return 8 if "64" in name else 2 if "true" in name and "16" in name else 4


def exit_with_plan(cfg: DictConfig, *, is_sweep: bool) -> None:
    """Prints the plan of a run and exits; UsageError where it cannot be counted."""
    if is_sweep:
        raise UsageError("plan counts one run: leave -m out, and give one value for each setting")
    try:
        with convert_to_usage_errors():
            table = count_plan(cfg)
    except UsageError:
        raise
    except Exception:  # Hydra would warn, and train
        traceback.print_exc()
        sys.exit(1)
    if get_launcher_rank() == 0:
        print(
            json.dumps(table, indent=2)
            if cfg.plan == "json"
            else format_plan(str(cfg.name), table, UTILISATION)
        )
    sys.exit(0)


def count_plan(cfg: DictConfig) -> PlanTable:
    """Tables of numbers, by the names of what they count."""
    if cfg.stage != "diffusion":
        raise UsageError(f"plan counts the training of a denoiser, and stage={cfg.stage} has none")
    if cfg.style_encoder:
        raise UsageError("plan counts no style encoder: leave style_encoder=.. out to count a run")
    adopt_published_groups(cfg, Path(str(cfg.name)))
    check_data_sets(cfg)
    check_buckets(cfg)
    check_strategy(cfg)
    task, run = instantiate(cfg.task), read_planned_run(cfg)
    check_data_kind(cfg, f"task={task.name}", is_video=task.is_video)
    autoencoder, text = count_autoencoder(cfg.autoencoder), count_text_encoder(cfg.text_encoder)
    number = adopt_cache(cfg) if is_cached(cfg) else count_images(cfg.data)
    denoiser = count_denoiser(cfg, autoencoder, text, task)
    check_image_size(cfg.data.size, autoencoder.factor * denoiser.multiple)
    sizes = {
        "denoiser": count_parameters(denoiser),
        "trained": count_parameters(denoiser, trained=True),
        "autoencoder": count_parameters(autoencoder),
        "text encoder": text.parameters,
    }
    moments = count_moments(cfg, run, denoiser)
    images, x0, cond = make_step_inputs(cfg, autoencoder, text, task, run.micro)
    steady = {"autoencoder": 0, "text encoder": 0} if is_cached(cfg) else sizes
    encode = (lambda: None) if is_cached(cfg) else partial(autoencoder.encode, images)
    cache = count_cache(autoencoder, text, x0, number)
    if is_cached(cfg):
        text = replace(text, flops=0)
    cost = count_step_cost(denoiser, encode, x0, cond, half=run.half)
    return {
        "parameters": sizes,
        "FLOPs of a step": count_flops(run, text, cost),
        "bytes of memory on a device": count_memory(cfg, run, sizes | steady, moments, cost),
        "run": count_length(cfg, run, number),
        "hours": count_hours(cfg, run, text, cost),
        "bytes on disk": count_disk(cfg, run, sizes, moments),
        "bytes of a cache": cache,
    }


def read_planned_run(cfg: DictConfig) -> PlannedRun:
    """The devices, the batch and the precision of a run."""
    devices, nodes = cfg.trainer.devices, cfg.trainer.num_nodes
    if devices in ("auto", -1):
        devices = max(torch.cuda.device_count(), 1)
    world = (devices if isinstance(devices, int) else len(devices)) * nodes
    precision = str(cfg.trainer.get("precision") or "32-true")
    if precision == "auto":
        precision = choose_precision(cfg.trainer.accelerator)
        if cfg.trainer.accelerator in ("gpu", "cuda") or cfg.trainer.get("peak_tflops"):
            precision = "bf16-mixed"  # of the device that is meant, which need not be here
    accumulate, batch = cfg.trainer.accumulate_grad_batches, cfg.data.batch_size
    micro = split_batch(batch, world, accumulate)
    return PlannedRun(world, micro, accumulate, cfg.trainer.max_steps, batch, precision)


def count_flops(run: PlannedRun, text: TextSizes, cost: StepCost) -> dict[str, object]:
    """Of a step of the whole batch; products and sums are counted apart."""
    parts = {
        "autoencoder": cost.encoder_flops,
        "text encoder": text.flops * run.micro,
        "denoiser forward": cost.forward_flops,
        "denoiser backward": cost.backward_flops,
    }
    parts["all"] = sum(parts.values())
    return {name: flops * run.world * run.accumulate for name, flops in parts.items()}


def count_moments(cfg: DictConfig, run: PlannedRun, denoiser: nn.Module) -> float:
    """Bytes of the optimizer's state of all weights that are trained."""
    each = run.weight_bytes
    layers = [weight.numel() for weight in denoiser.parameters() if weight.requires_grad]
    if cfg.optimizer._target_ == ADAMW_8BIT_TARGET:  # a scale of 4 bytes for 256 of them
        return sum(2 * n * (each if n < 4096 or n % 256 else 1 + 4 / 256) for n in layers)
    moments = 2 * each * sum(layers)
    if cfg.optimizer._target_ == MUON_TARGET:  # no mean of squares
        from ldm.training.muon import find_matrices  # Lightning: seconds

        moments -= each * sum(weight.numel() for weight in find_matrices(denoiser))
    return moments


def count_memory(
    cfg: DictConfig, run: PlannedRun, sizes: Mapping[str, int], moments: float, cost: StepCost
) -> dict[str, object]:
    """Of one device, by part, and the most at a time."""
    is_sharded = "fsdp" in (cfg.strategy or {}).get("_target_", "")
    shards, each = run.world if is_sharded else 1, run.weight_bytes
    trained = sizes["trained"]
    parts = {
        "weights": each * sizes["denoiser"] / shards,
        "gradients": each * trained / shards,
        "optimizer": moments / shards,
        "EMA": each * trained / shards,
        "phema": each * trained * len(cfg.phema.lengths) / shards,
        "frozen encoders": 4.0 * (sizes["autoencoder"] + sizes["text encoder"]),
    }
    still = sum(parts.values()) - parts["gradients"]
    parts |= {"encoding, at most": cost.encoder_bytes, "activations": cost.activation_bytes}
    # The gradients of the step before are freed between the forward and the backward pass.
    forward = parts["gradients"] + max(cost.encoder_bytes, cost.activation_bytes)
    backward = cost.backward_bytes - (each * trained - parts["gradients"])
    if run.accumulate > 1:
        backward += parts["gradients"]
    return {
        name: round(n) for name, n in (parts | {"peak": still + max(forward, backward)}).items()
    }


def adopt_cache(cfg: DictConfig) -> int | None:
    """Sets `data.size` to that of the cache, and returns its number of samples, if it is here."""
    if list_caches(cfg, "train"):
        manifest = open_training_cache(cfg)
        cfg.data.size = manifest.size
        return manifest.samples
    if cfg.data.size is None:
        raise UsageError(
            f"data.train={cfg.data.get('train')} is no cache, so that plan=true needs the size of "
            "its images: give data.size=256"
        )
    return count_images(OmegaConf.create({"train": cfg.data.get("train_images")}))


def count_images(data: DictConfig) -> int | None:
    """The training images of a data set that is drawn, or whose shards lie here; else None."""
    if (count := data.get("count")) is not None:
        return count
    places = list_locations(data.get("train") or [])
    if not places or any(is_url(str(place)) for place in places):
        return None
    try:
        options = ReadOptions(read_only=True, on_error="skip")
        return sum(len(open_index(str(place), options)) for place in places)
    except (OSError, ValueError):
        return None


def count_length(cfg: DictConfig, run: PlannedRun, number: int | None) -> dict[str, object]:
    """Steps, images seen and epochs."""
    seen = run.steps * run.batch
    epochs = None if number is None else round(seen / number, 2)
    devices = f"{run.world} x {run.micro} x {run.accumulate}"
    return {
        "steps": run.steps,
        "images a step": run.batch,
        "devices x images x micro-steps": devices,
        "precision": run.precision,
        "images seen": seen,
        "training images": number,
        "epochs": epochs,
        "validations": run.steps // cfg.trainer.val_check_interval + bool(cfg.validate_first),
    }


def count_hours(
    cfg: DictConfig, run: PlannedRun, text: TextSizes, cost: StepCost
) -> dict[str, object]:
    """Of the training, and of the images that are generated to be measured."""
    training = run.steps * run.accumulate * (cost.flops + text.flops * run.micro)  # a device's
    image = cost.forward_flops / run.micro
    measured = 0.0
    if (images := cfg.eval.get("images")) is not None and "count" in images:
        times = run.steps // cfg.trainer.val_check_interval + bool(cfg.validate_first)
        if images.get("every"):
            times = min(times, math.ceil(run.steps * run.batch / images.every) + 1)
        measured = times * images.count * images.steps * 2 * image / run.world  # with guidance
    is_float32 = "32" in run.precision
    own = cfg.trainer.get("peak_tflops")
    if own is None and torch.cuda.is_available():
        own = find_peak_tflops(torch.device("cuda"), run.precision)
    peaks = {"this device": own}
    if own is None:
        peaks = {name.rstrip("$"): PEAK_TFLOPS[name][is_float32] for name in SHOWN_DEVICES}
    hours: dict[str, object] = {}
    for name, peak in peaks.items():
        speed = peak * 1e12 * UTILISATION * 3600
        hours[f"training, {name} of {peak:g} TFLOP/s"] = float(f"{training / speed:.3g}")
        if measured:
            hours[f"generated images, {name}"] = float(f"{measured / speed:.3g}")
    return hours


def count_disk(
    cfg: DictConfig, run: PlannedRun, sizes: Mapping[str, int], moments: float
) -> dict[str, object]:
    """Of what the run writes, at its end."""
    each, trained = run.weight_bytes, sizes["trained"]
    tracks = len(cfg.phema.lengths)
    checkpoint = round(each * (2 * sizes["denoiser"] + tracks * trained) + moments)
    saves = math.ceil(run.steps / cfg.checkpoint.every)
    kept = min(saves, cfg.checkpoint.keep) + min(cfg.checkpoint.keep_best, saves)
    snapshots = math.ceil(run.steps / cfg.phema.every) if tracks else 0
    validations = run.steps // cfg.trainer.val_check_interval + bool(cfg.validate_first)
    return {
        "a checkpoint": checkpoint,
        f"checkpoints ({kept} kept)": kept * checkpoint,
        "weights/": saves * each * sizes["denoiser"] if cfg.checkpoint.weights else 0,
        "phema/": snapshots * tracks * each * trained,
        "samples, at most": validations * cfg.samples.n * 3 * cfg.data.size**2,
    }


def count_cache(
    autoencoder: torch.nn.Module, text: TextSizes, x0: torch.Tensor, number: int | None
) -> dict[str, object]:
    """Of `ldm cache` of this data: one sample, and all samples if their number is known."""
    latent = x0[0].numel()
    state = text.max_length * text.width + text.pooled_width
    mask = text.max_length if text.has_mask else 0
    sizes: dict[str, object] = {}
    for name, width in (("16 bit", 2), ("float32", 4)):
        one = 2 * latent * width + state * width + mask + 2 * MEMBER_BYTES
        sizes[f"a sample, moments and a caption, {name}"] = one
        sizes[f"each other caption, {name}"] = state * width + mask
        sizes[f"means in place of moments, {name}"] = -latent * width
        if number is not None:
            sizes[f"all {number} samples, {name}"] = number * one
    return sizes
