"""Configuration to a run: data, module, trainer, callbacks and loggers."""

import json
import logging
import os
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ldm import checkpoint, ranking
from ldm.build import parts, stages
from ldm.build.guidance import guidance
from ldm.cli import UsageError
from ldm.data.datamodule import TextImageData
from ldm.models.frames import Frames
from ldm.painting import examples
from ldm.pipeline import Pipeline
from ldm.runs import is_job, launched, rank, write_result
from ldm.training import ranks
from ldm.training.callbacks import Meter, ModuleNoise, Pictures, ProgressBar
from ldm.training.checkpoint import Checkpoints, SafeCheckpointIO
from ldm.training.csv_log import CsvLog
from ldm.training.diffusion import LatentDiffusion
from ldm.training.fsdp import Sharded
from ldm.training.preemption import StopOnSignal
from ldm.training.snapshots import Snapshots
from ldm.training.stability import SkipNonFinite

# Groups that decide what a picture looks like.
PAINT = [*parts.FROZEN, "model", "scheduler", "objective", "task", "sampler", "guidance"]


@dataclass
class Job:
    """All that a run needs."""

    data: TextImageData
    module: L.LightningModule
    trainer: L.Trainer
    meter: Meter
    resume: Path | None  # the checkpoint to go on from

    def metrics(self) -> dict[str, float]:
        """The newest value of each logged metric."""
        logged = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        return {**self.meter.latest, **logged}

    def outcome(self, run_dir: Path, metric: str) -> dict:
        """What has come of the run so far, for result.json."""
        last = run_dir / "checkpoints" / "last.ckpt"
        step = self.trainer.global_step
        return {
            "metric": metric,
            "value": self.metrics().get(metric),
            "steps": step,
            "stopped_early": self.trainer.should_stop and step < self.trainer.max_steps,
            "images_seen": self.data.position,
            "checkpoint": os.path.relpath(last.resolve(), run_dir) if last.exists() else None,
        }

    def failed(self, run_dir: Path, error: BaseException) -> tuple[str, bool]:
        """What has ended the run, in words, and whether it is this rank that must tell it."""
        if self.trainer.world_size == 1:
            return ranks.in_words(error), True
        said, own = ranks.first_error(run_dir, error, rank=self.trainer.global_rank)
        if not own:
            print(f"the first error was {said}", flush=True)
        return said, own

    def finish(self, run_dir: Path, metric: str, direction: str, result: dict) -> None:
        """Leave result.json, and close the loggers.

        A sweep's job first shows there how it compares to those before it. A disk without room for
        result.json is told, and changes nothing else: the same command writes it another time.
        """
        try:
            write_result(run_dir, result)
        except OSError as error:
            print(f"{run_dir}/result.json cannot be written: {error.strerror or error}", flush=True)
        if is_job(run_dir):
            beside = [ranking.read(found) for found in ranking.find([run_dir.parent])]
            order = ranking.ranked(beside, metric, direction=direction)
            columns, rows = ranking.table(order, metric)
        for logger in self.trainer.loggers:
            if is_job(run_dir) and hasattr(logger, "log_table"):
                logger.log_table("ranking", columns=columns, data=rows)
            if hasattr(logger, "finish"):
                logger.finish(failed=result["status"] == "failed")
        for callback in self.trainer.callbacks:
            if isinstance(callback, Checkpoints):
                ranks.end(callback.started)

    def describe(self) -> str:
        """One line: what is trained, on what, how long."""
        trained = sum(p.numel() for p in self.module.parameters() if p.requires_grad)
        return (
            f"{type(self.module).__name__}, {trained / 1e6:.1f} M parameters, on "
            f"{len(self.data.train_set)} images ({len(self.data.val_set)} for validation): "
            f"{self.trainer.max_steps} steps of {self.data.batch_size} images on "
            f"{self.trainer.world_size} x {self.trainer.strategy.root_device.type}"
        )


def build(cfg: DictConfig, run_dir: Path) -> Job:
    """Everything for `cfg.stage`, one of diffusion, autoencoder, clip and classifier."""
    makers = {
        "diffusion": diffusion,
        "autoencoder": stages.autoencoder,
        "clip": stages.clip,
        "classifier": stages.classifier,
    }
    if cfg.stage not in makers:
        raise UsageError(f"stage={cfg.stage} is none of {', '.join(makers)}")
    for name in ("lightning.pytorch", "lightning.fabric", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data workers are forked
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own affair
    warnings.filterwarnings("ignore", message=".*in eval mode at the start.*")  # EMA and text are
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")  # no need of it
    warnings.filterwarnings("ignore", message=".*get_last_lr.*")  # a resumed run's, of torch
    L.seed_everything(cfg.seed, verbose=False)
    data = instantiate(cfg.data, seed=cfg.seed)
    if cfg.stage != "diffusion":
        stages.kind_fits(cfg, data, temporal=False)
    module, callbacks, frozen = makers[cfg.stage](cfg, data, run_dir)
    facts = {
        "stage": cfg.stage,
        "config": OmegaConf.to_yaml(cfg, resolve=True),
        "frozen": {name: checkpoint.digest(part) for name, part in frozen.items()},
    }
    module.to(memory_format=torch.channels_last)  # what convolutions like best, on any device
    resume = checkpoint.newest(run_dir / "checkpoints")
    if rank() == 0:
        checkpoint.check_writable(run_dir / "checkpoints")
        ranks.forget_error(run_dir)
    if resume is not None:
        state = checkpoint.unverified(resume)["state_dict"]
        checkpoint.check_fits(module, state, what=str(resume))
    if resume is None and rank() == 0:
        (run_dir / "metrics.csv").unlink(missing_ok=True)  # of a try without a checkpoint
    meter = Meter(every=cfg.trainer.log_every_n_steps)
    built = trainer(cfg, run_dir, callbacks, meter, facts)
    data.micro_batch(built.world_size, built.accumulate_grad_batches)  # says now what is wrong
    if isinstance(built.strategy, Sharded):
        built.strategy.check(module)
    for logger in built.loggers:
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
    return Job(data, module, built, meter, resume)


def trainer(
    cfg: DictConfig, run_dir: Path, callbacks: list[L.Callback], meter: Meter, facts: dict
) -> L.Trainer:
    """Lightning's Trainer with our checkpoints, meters and loggers."""
    best = {"metric": cfg.metric, "direction": cfg.direction}
    keeper = Checkpoints(run_dir / "checkpoints", **cfg.checkpoint, **best, facts=facts)
    report = run_dir / "bad_batches.json"
    skip = SkipNonFinite(report, meter=meter, stop_after=cfg.stop_after_skips)
    ours = cfg.trainer.max_hours
    stops = [StopOnSignal(keeper.save_now, every=meter.every, max_hours=ours)]
    if cfg.early_stop:
        stops.append(instantiate(cfg.early_stop))
    loggers = [CsvLog(run_dir / "metrics.csv")]
    if cfg.logger:
        handed = {"run_dir": run_dir, "name": cfg.name, "overrides": given()}
        loggers.append(instantiate(cfg.logger, **handed))
    accumulate = cfg.trainer.accumulate_grad_batches
    return instantiate(
        OmegaConf.masked_copy(cfg.trainer, [key for key in cfg.trainer if key != "max_hours"]),
        **world(cfg),
        strategy=instantiate(cfg.strategy) if cfg.strategy else "auto",
        # Lightning counts this in batches, we in optimizer steps.
        val_check_interval=cfg.trainer.val_check_interval * accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # the data knows its rank
        inference_mode=False,  # metrics of a validation before training must live on in training
        plugins=[SafeCheckpointIO()],
        callbacks=[
            meter,
            ModuleNoise(cfg.seed),
            ProgressBar(meter),
            skip,
            *callbacks,
            keeper,
            *stops,
        ],
        logger=loggers,
        default_root_dir=run_dir,
        enable_checkpointing=False,  # Lightning's own
        enable_model_summary=False,
        _convert_="all",
    )


def given() -> list[str]:
    """The settings that this run was given on the command line, without its name."""
    task = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    return [text for text in task if not text.startswith("name=")]


def world(cfg: DictConfig) -> dict[str, int]:
    """Devices and machines where torchrun or srun has started the processes; else nothing.

    Raises UsageError where the configuration asks for others.
    """
    if (started := launched()) is None:
        return {}
    asked = cfg.trainer.devices, cfg.trainer.num_nodes
    if asked[0] != "auto" and asked not in ((1, 1), started):
        raise UsageError(
            f"{started[0]} processes on each of {started[1]} machines were started, and "
            f"trainer.devices={asked[0]}, trainer.num_nodes={asked[1]} ask for others: leave them "
            "out, the launcher's numbers are taken"
        )
    return {"devices": started[0], "num_nodes": started[1]}


def diffusion(cfg: DictConfig, data: TextImageData, run_dir: Path):
    """LatentDiffusion with its sample pictures, and the frozen parts it rests on."""
    autoencoder, text = parts.frozen(cfg)
    stages.readable(text, data)
    frozen = {"autoencoder": autoencoder, "text_encoder": text}
    task, objective = instantiate(cfg.task), parts.objective(cfg)
    stages.kind_fits(cfg, data, temporal=task.temporal)
    style = parts.style_encoder(cfg)
    network = parts.denoiser(cfg, autoencoder, text, task, style)
    if cfg.init is not None and checkpoint.newest(run_dir / "checkpoints") is None:
        told = parts.begin_from(cfg.init, network, frozen, objective.schedule)
        if rank() == 0:
            print(told, flush=True)
    if style is not None:
        frozen[parts.STYLE] = style
    autoencoder = autoencoder if data.frames is None else Frames(autoencoder)
    module = LatentDiffusion(
        network,
        autoencoder,
        text,
        objective,
        task,
        optimizer=instantiate(cfg.optimizer),
        ema_decay=cfg.ema_decay,
        phema_lengths=cfg.phema.lengths,
        caption_dropout=cfg.caption_dropout,
        validate_raw=cfg.validate_raw,
        style_encoder=style,
        seed=cfg.seed,
    )
    gpu = cfg.trainer.accelerator != "cpu" and torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if gpu else "cpu")
    pipeline = Pipeline(
        module.ema.module,
        autoencoder=autoencoder,
        text=text,
        objective=objective,
        task=task,
        sampler=instantiate(cfg.sampler),
        guidance=guidance(cfg.guidance, parts.Beside(autoencoder, text, objective, task, device)),
        dtype=parts.autocast(cfg.trainer.get("precision")) if gpu else None,  # as pipelines.restore
        trained_size=data.size,
        frames=data.frames,
        style_encoder=style,
    )
    stages.fits(data.size, autoencoder.factor * 2 ** (len(cfg.model.multipliers) - 1))
    asked = cfg.samples.prompts or data.val_captions(cfg.samples.n)
    prompts = [asked] if isinstance(asked, str) else list(asked)
    draw = partial(
        examples, pipeline, data.val_set, prompts, steps=cfg.samples.steps, seed=cfg.seed
    )
    callbacks = [Pictures(run_dir / "samples", draw)]
    if module.phema is not None:
        callbacks.append(Snapshots(run_dir / "phema", every=cfg.phema.every))
    if task.from_pictures and cfg.eval and rank() == 0:
        print(f"eval: task={task.name} begins with a picture, so val/loss alone is measured")
    if "scenes" in cfg.eval and not task.from_pictures:
        callbacks.append(instantiate(cfg.eval.scenes, pipeline, size=data.size))
    if "images" in cfg.eval and not task.from_pictures:
        networks = [instantiate(network) for network in cfg.features.values()]
        seen = {"pictures": data.val_set, "others": data.train_set.plain(), "size": data.size}
        place = {"folder": run_dir / "eval", "raw_denoiser": module.denoiser}
        whole = OmegaConf.to_container(cfg, resolve=True)
        painted = {"dtype": str(pipeline.dtype), **{name: whole[name] for name in PAINT}}
        place["settings"] = json.dumps(painted, sort_keys=True)
        callbacks.append(instantiate(cfg.eval.images, pipeline, networks, **seen, **place))
    return module, callbacks, frozen
