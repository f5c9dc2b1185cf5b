"""Configuration to a run, from top to bottom: data, components, module, callbacks, trainer."""

import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.loggers.logger import Logger
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ldm.config.cache_settings import is_cached
from ldm.config.cached_training import build_cached_components
from ldm.config.callbacks import (
    build_callbacks,
    build_evaluation_callbacks,
    build_own_callbacks,
    build_sample_callbacks,
)
from ldm.config.components import (
    build_components,
    build_image_metrics,
    choose_precision,
    get_autocast_dtype,
)
from ldm.config.export_check import describe_export
from ldm.config.guidance import build_guidance
from ldm.config.loggers import build_loggers
from ldm.config.published import open_checkpoint
from ldm.config.sample_options import get_compile_mode, print_on_first_rank
from ldm.config.size_multiple import read_size_multiple
from ldm.config.stages import (
    build_autoencoder_training,
    build_classifier_training,
    build_clip_training,
)
from ldm.config.training_checks import (
    check_bucket_sizes,
    check_captions_readable,
    check_data_kind,
    check_image_size,
    get_devices,
)
from ldm.config.trust import list_trusted_packages
from ldm.data.datamodule import TextImageData
from ldm.evaluation.image_metrics import ImageMetric
from ldm.experiments.run_dir import LORA_FILE
from ldm.inference.components import Components
from ldm.inference.pipeline import Pipeline
from ldm.models.kernels import choose_memory_format
from ldm.models.warm_start import warm_start
from ldm.training.callbacks.checkpoint_storage import SafeCheckpointIO
from ldm.training.callbacks.deferred import DeferredRelease
from ldm.training.callbacks.ema_snapshots import EMASnapshots
from ldm.training.callbacks.lora_file import LoraFile
from ldm.training.callbacks.monitoring import ThroughputMonitor
from ldm.training.fsdp import FullyShardedStrategy
from ldm.training.job import TrainingJob, prepare_run_directory
from ldm.training.lightning_adapter import NoProfiler, defer_launch_signals
from ldm.training.modules.diffusion import LatentDiffusion
from ldm.utils.checkpoint_file import find_newest_checkpoint
from ldm.utils.errors import UsageError, format_program
from ldm.utils.signals import StopSignals

STAGE_BUILDERS = {  # the stages that train no denoiser
    "autoencoder": build_autoencoder_training,
    "clip": build_clip_training,
    "classifier": build_classifier_training,
}
OWN_KEYS = ("max_hours", "peak_tflops")  # of cfg.trainer, which Lightning's Trainer lacks
HIDDEN_WARNINGS = (
    "LeafSpec",  # Lightning's own affair
    "in eval mode at the start",  # the average and the text encoder are
    "smaller than the logging interval",
    "`srun` command is available",  # it is not needed
    "get_last_lr",  # torch's, in a resumed run
)


def build_job(cfg: DictConfig, run_dir: Path, signals: StopSignals | None = None) -> TrainingJob:
    """Everything for `cfg.stage`: diffusion, autoencoder, clip or classifier."""
    if cfg.stage not in ("diffusion", *STAGE_BUILDERS):
        raise UsageError(f"stage={cfg.stage} is none of diffusion, {', '.join(STAGE_BUILDERS)}")
    devices = get_devices(cfg)
    hide_warnings()
    if cfg.trainer.get("precision") == "auto":
        cfg.trainer.precision = choose_precision(cfg.trainer.accelerator)
    own_callbacks = build_own_callbacks(cfg)  # before the seed: they may draw random numbers
    L.seed_everything(cfg.seed, verbose=False)
    # What does not fit together is refused before data are generated or downloaded.
    if cfg.stage == "diffusion":
        print_on_first_rank(describe_export(cfg))
        components, metrics = build_diffusion_components(cfg, run_dir), build_image_metrics(cfg)
        build = partial(build_diffusion_training, components, metrics)
    else:
        components = None
        check_data_kind(cfg, f"stage={cfg.stage}", is_video=False)
        build = STAGE_BUILDERS[cfg.stage]
    loggers = build_loggers(cfg, run_dir)
    data = instantiate(cfg.data, seed=cfg.seed, **get_bucket_grid(cfg, components))
    if data.buckets is not None:
        print_on_first_rank(data.buckets[0].describe())
    module, callbacks, digests = build(cfg, data, run_dir)
    allowed = {key.partition(".")[0] for key in cfg.resume.allow}
    kept = {name: digest for name, digest in digests.items() if name not in allowed}
    rules = {} if "source" in allowed else data.rules()
    resume = prepare_run_directory(run_dir, module, kept, rules=rules)
    monitor = ThroughputMonitor(
        every=cfg.trainer.log_every_n_steps,
        peak_tflops=cfg.trainer.get("peak_tflops"),
        count_flops=module.count_flops if cfg.stage == "diffusion" else None,
    )
    facts = {"stage": cfg.stage, "config": OmegaConf.to_yaml(cfg, resolve=True), "frozen": digests}
    if cfg.stage == "diffusion" and cfg.lora.rank:
        facts["lora"] = {"rank": cfg.lora.rank, "alpha": get_lora_alpha(cfg)}
    callbacks += own_callbacks
    callbacks = build_callbacks(cfg, run_dir, callbacks, monitor, facts, signals)
    trainer = build_trainer(cfg, run_dir, callbacks, loggers, devices)
    lay_out(module, trainer.strategy.root_device, get_autocast_dtype(cfg.trainer.get("precision")))
    defer_launch_signals(trainer)
    # Refuses now a batch size that the devices cannot share.
    data.micro_batch(trainer.world_size, trainer.accumulate_grad_batches)
    if isinstance(trainer.strategy, FullyShardedStrategy):
        trainer.strategy.check_module(module)
    settings = OmegaConf.to_container(cfg, resolve=True)
    if data.buckets is not None:
        settings |= {"buckets": data.buckets[0].summarize()}
    for logger in trainer.loggers:
        logger.log_hyperparams(settings)
    return TrainingJob(data, module, trainer, monitor, resume)


def hide_warnings() -> None:
    """Hides messages of libraries that are no news here."""
    for name in ("lightning.pytorch", "lightning.fabric", "matplotlib", "httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data workers are forked
    for text in HIDDEN_WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{text}.*")


def build_diffusion_components(cfg: DictConfig, run_dir: Path) -> Components:
    """The components of a denoiser's training; a new run starts from the weights of `cfg.init`."""
    task = instantiate(cfg.task)
    if task.sampling_only:
        raise UsageError(
            f"task={task.name} is a way of sampling from any run of text to image, and nothing to "
            f"train: leave it out here, then give `{format_program('sample')} ckpt=... "
            f"task={task.name}`"
        )
    check_data_kind(cfg, f"task={task.name}", is_video=task.is_video)
    if task.is_video and cfg.style_encoder:
        raise UsageError(f"task={task.name} takes no style images: leave style_encoder=.. out")
    task.check_size(cfg.data.size)
    build = build_cached_components if is_cached(cfg) else build_components
    components = build(cfg, task)
    multiple = components.autoencoder.factor * components.denoiser.multiple
    check_image_size(cfg.data.size, multiple)
    if (buckets := cfg.data.get("buckets")) not in (None, "auto"):
        check_bucket_sizes(buckets, multiple)
        for side in {side for size in buckets for side in size}:
            task.check_size(side)
    if cfg.init is not None and find_newest_checkpoint(run_dir / "checkpoints") is None:
        print_on_first_rank(warm_start_from_init(cfg, components))
    if cfg.lora.rank:
        from ldm.models.lora import add_lora_layers  # peft

        add_lora_layers(
            components.denoiser,
            rank=cfg.lora.rank,
            alpha=get_lora_alpha(cfg),
            targets=cfg.lora.targets,
        )
    return components


def get_bucket_grid(cfg: DictConfig, components: Components | None) -> dict[str, int]:
    """The argument of the data that says what sides of buckets are multiples of, if any has it."""
    if cfg.data.get("buckets") is None:
        return {}
    if components is None:
        return {"grid": read_size_multiple(cfg, stage=cfg.stage)}
    return {"grid": components.autoencoder.factor * components.denoiser.multiple}


def warm_start_from_init(cfg: DictConfig, components: Components) -> str:
    """Copies the weights of a run or a published model into the denoiser; a line that says so.

    UsageError where the components are other ones than those that the weights were trained with.
    """
    source = open_checkpoint(cfg.init, name="init", trust=list_trusted_packages(cfg))
    if others := source.list_differences(components, cfg):
        raise UsageError(
            f"init={cfg.init} was trained with another {' and '.join(others)}: "
            f"{source.format_remedy(others)}"
        )
    new = warm_start(components.denoiser, source.read_weights(), source=cfg.init)
    if new and cfg.lora.rank:
        raise UsageError(
            f"init={cfg.init} lacks {', '.join(new)}, which adapters of LoRA cannot learn: train "
            "these without lora.rank first, then give that run as init"
        )
    more = f"; new, and without effect as yet: {', '.join(new)}" if new else ""
    return f"init: the weights of {source.path}{more}"


def get_lora_alpha(cfg: DictConfig) -> float:
    """The alpha of the adapters, which are multiplied by alpha / rank."""
    return float(cfg.lora.alpha or cfg.lora.rank)


def build_diffusion_training(
    components: Components,
    metrics: Mapping[str, ImageMetric],
    cfg: DictConfig,
    data: TextImageData,
    run_dir: Path,
) -> tuple[LatentDiffusion, list[L.Callback], dict[str, str]]:
    """LatentDiffusion, its callbacks, and the digests of the frozen components."""
    check_captions_readable(components.text_encoder, data)
    if cfg.model.get("size_embedding"):
        data.train_set.gives_sizes = data.val_set.gives_sizes = True
    module = LatentDiffusion(
        components,
        optimizer=instantiate(cfg.optimizer),
        ema_decay=cfg.ema_decay,
        phema_lengths=cfg.phema.lengths,
        caption_dropout=cfg.caption_dropout,
        validate_raw=cfg.validate_raw,
        posterior=cfg.posterior,
        seed=cfg.seed,
        rng=cfg.rng,
    )
    if (mode := get_compile_mode(cfg)) is not None:
        from ldm.models.compilation import compile_network  # the compiler takes a second to import

        for network in (module.denoiser, module.ema.module):
            compile_network(network, mode, report=print_on_first_rank)
    pipeline = build_validation_pipeline(cfg, module, data)
    callbacks = build_sample_callbacks(cfg, pipeline, data, run_dir)
    if module.phema is not None:
        callbacks.append(EMASnapshots(run_dir / "phema", every=cfg.phema.every))
    if cfg.lora.rank:
        facts = {"title": str(cfg.name), "kind": components.objective.prediction.kind}
        facts["linear"] = cfg.model.get("linear_projections", False)
        facts["sizes"] = cfg.model.get("size_embedding", 0) > 0
        scale = get_lora_alpha(cfg) / cfg.lora.rank
        callbacks.append(LoraFile(run_dir / LORA_FILE, size=data.size, scale=scale, **facts))
    callbacks += build_evaluation_callbacks(cfg, pipeline, module.denoiser, data, run_dir, metrics)
    if is_cached(cfg):
        parts = components.frozen.values()
        callbacks.append(DeferredRelease(*(part.deferred for part in parts)))
    return module, callbacks, {name: components.hash_frozen(name) for name in components.frozen}


def build_validation_pipeline(
    cfg: DictConfig, module: LatentDiffusion, data: TextImageData
) -> Pipeline:
    """The pipeline of the averaged denoiser, which generates images at validations."""
    on_gpu = cfg.trainer.accelerator != "cpu" and torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_gpu else "cpu")
    components, trust = module.components, list_trusted_packages(cfg)
    return Pipeline(
        replace(components, denoiser=module.ema.module),
        instantiate(cfg.sampler),
        build_guidance(cfg.guidance, components, device=device, trust=trust),
        dtype=get_autocast_dtype(cfg.trainer.get("precision")) if on_gpu else None,
        trained_size=data.size,
        num_frames=data.frames,
        rng=cfg.rng,
    )


def lay_out(module: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
    """Gives the networks the fastest layout and the device its fastest settings for training."""
    module.to(memory_format=choose_memory_format(device.type, dtype))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as convolutions have by default


def build_trainer(
    cfg: DictConfig,
    run_dir: Path,
    callbacks: list[L.Callback],
    loggers: list[Logger],
    devices: dict[str, int],
) -> L.Trainer:
    """Lightning's Trainer, with our callbacks and loggers in place of its own."""
    return instantiate(
        OmegaConf.masked_copy(cfg.trainer, [key for key in cfg.trainer if key not in OWN_KEYS]),
        **devices,
        strategy=instantiate(cfg.strategy) if cfg.strategy else "auto",
        # Lightning counts this in batches, we in optimizer steps.
        val_check_interval=cfg.trainer.val_check_interval * cfg.trainer.accumulate_grad_batches,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # the data knows its rank
        inference_mode=False,  # metrics of the first validation are used in training as well
        plugins=[SafeCheckpointIO()],
        callbacks=callbacks,
        logger=loggers,
        profiler=NoProfiler(),
        default_root_dir=run_dir,
        enable_checkpointing=False,  # Lightning's own
        enable_model_summary=False,
        _convert_="all",
    )
