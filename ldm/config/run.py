"""Configuration to a run: data, module, trainer, callbacks and loggers."""

import logging
import math
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

from ldm.config.denoising import build_diffusion_module, build_training_components
from ldm.config.stages import (
    build_autoencoder_training,
    build_classifier_training,
    build_clip_training,
    check_data_kind,
)
from ldm.data.datamodule import TextImageData
from ldm.experiments.ranking import build_ranking_table, find_runs, rank_runs, read_run_record
from ldm.experiments.run_dir import (
    find_last_value,
    get_launcher_layout,
    get_launcher_rank,
    is_sweep_job,
    read_metrics,
    read_partial_result,
    write_result,
)
from ldm.training.callbacks.checkpoint_storage import SafeCheckpointIO
from ldm.training.callbacks.checkpointing import Checkpoints
from ldm.training.callbacks.monitoring import ProgressBar, RandomLayerSeeding, ThroughputMonitor
from ldm.training.callbacks.nonfinite import (
    NON_FINITE_REMEDY,
    NonFiniteStepSkipper,
    NotFiniteError,
    find_non_finite_metrics,
    format_last_good_checkpoint,
)
from ldm.training.callbacks.preemption import PreemptionHandler
from ldm.training.distributed import format_exception, record_first_error, remove_first_error
from ldm.training.fsdp import FullyShardedStrategy
from ldm.training.lightning_adapter import defer_launch_signals
from ldm.training.loggers.csv import CsvLog
from ldm.utils.checkpoint_facts import read_state_dict
from ldm.utils.checkpoint_file import (
    check_module_state,
    find_newest_checkpoint,
    parse_checkpoint_step,
    read_unverified_checkpoint,
)
from ldm.utils.errors import UsageError
from ldm.utils.files import check_writable
from ldm.utils.hashing import hash_module
from ldm.utils.signals import StopSignals

STAGE_BUILDERS = {  # of what is trained beside the denoiser
    "autoencoder": build_autoencoder_training,
    "clip": build_clip_training,
    "classifier": build_classifier_training,
}


@dataclass
class TrainingJob:
    """All that a run needs."""

    data: TextImageData
    module: L.LightningModule
    trainer: L.Trainer
    meter: ThroughputMonitor
    resume: Path | None  # the checkpoint to go on from

    def metrics(self) -> dict[str, float]:
        """The newest value of each logged metric."""
        logged = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        return {**self.meter.latest, **logged}

    def outcome(self, run_dir: Path, metric: str) -> dict:
        """What has come of the run so far, for result.json."""
        newest = run_dir / "checkpoints" / "last.ckpt"
        step = self.trainer.global_step
        if self.resume is not None and step < parse_checkpoint_step(
            self.resume
        ):  # ended while it loaded
            return read_partial_result(run_dir, metric)
        return {
            "metric": metric,
            "value": self.metrics().get(metric),
            "steps": step,
            "stopped_early": self.trainer.should_stop and step < self.trainer.max_steps,
            "images_seen": self.data.position,
            "checkpoint": os.path.relpath(newest.resolve(), run_dir) if newest.exists() else None,
        }

    def check_end(self, run_dir: Path, metric: str) -> None:
        """Raise NotFiniteError where the last validation says that the weights are ruined."""
        rows = read_metrics(run_dir)  # of an earlier call, where there was nothing left to train
        values = {
            name: find_last_value(rows, name) for name in ("val/loss", metric)
        } | self.metrics()
        if names := find_non_finite_metrics(values, metric):
            sound = [row["step"] for row in rows if math.isfinite(row.get(names[0], math.nan))]
            folder, before = run_dir / "checkpoints", int(max(sound, default=-1)) + 1
            raise NotFiniteError(
                f"the last validation's {names[0]} is {values[names[0]]}. "
                f"{format_last_good_checkpoint(folder, before)}; {NON_FINITE_REMEDY}"
            )

    def failed(self, run_dir: Path, error: BaseException) -> tuple[str, bool]:
        """What has ended the run, in words, and whether it is this rank that must tell it."""
        if self.trainer.world_size == 1:
            return format_exception(error), True
        said, own = record_first_error(run_dir, error, rank=self.trainer.global_rank)
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
        if is_sweep_job(run_dir):
            beside = [read_run_record(found) for found in find_runs([run_dir.parent])]
            order = rank_runs(beside, metric, direction=direction)
            columns, rows = build_ranking_table(order, metric)
        for logger in self.trainer.loggers:
            if is_sweep_job(run_dir):
                logger.log_table("ranking", columns=columns, data=rows)
            logger.finish(failed=result["status"] == "failed")

    def describe(self) -> str:
        """One line: what is trained, on what, how long."""
        trained = sum(p.numel() for p in self.module.parameters() if p.requires_grad)
        kind = "images" if self.data.frames is None else "videos"
        return (
            f"{type(self.module).__name__}, {trained / 1e6:.1f} M parameters, on "
            f"{len(self.data.train_set)} {kind} ({len(self.data.val_set)} for validation): "
            f"{self.trainer.max_steps} steps of {self.data.batch_size} {kind} on "
            f"{self.trainer.world_size} x {self.trainer.strategy.root_device.type}"
        )


def build_job(cfg: DictConfig, run_dir: Path, signals: StopSignals | None = None) -> TrainingJob:
    """Everything for `cfg.stage`, one of diffusion, autoencoder, clip and classifier.

    signals: of the process, where somebody listens to them already.
    """
    if cfg.stage not in ("diffusion", *STAGE_BUILDERS):
        raise UsageError(f"stage={cfg.stage} is none of diffusion, {', '.join(STAGE_BUILDERS)}")
    for name in ("lightning.pytorch", "lightning.fabric", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data workers are forked
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own affair
    warnings.filterwarnings("ignore", message=".*in eval mode at the start.*")  # EMA and text are
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")  # no need of it
    warnings.filterwarnings("ignore", message=".*get_last_lr.*")  # a resumed run's, of torch
    L.seed_everything(cfg.seed, verbose=False)
    # What does not go together is told before data are drawn or fetched.
    if cfg.stage == "diffusion":
        make = partial(build_diffusion_module, build_training_components(cfg, run_dir))
    else:
        check_data_kind(cfg, f"stage={cfg.stage}", temporal=False)
        make = STAGE_BUILDERS[cfg.stage]
    data = instantiate(cfg.data, seed=cfg.seed)
    module, callbacks, frozen = make(cfg, data, run_dir)
    facts = {
        "stage": cfg.stage,
        "config": OmegaConf.to_yaml(cfg, resolve=True),
        "frozen": {name: hash_module(part) for name, part in frozen.items()},
    }
    module.to(memory_format=torch.channels_last)  # what convolutions like best, on any device
    resume = find_newest_checkpoint(run_dir / "checkpoints")
    if get_launcher_rank() == 0:
        check_writable(run_dir / "checkpoints")
        remove_first_error(run_dir)
    if resume is not None:
        state = read_state_dict(read_unverified_checkpoint(resume), resume)
        check_module_state(module, state, what=str(resume))
    if resume is None and get_launcher_rank() == 0:
        (run_dir / "metrics.csv").unlink(missing_ok=True)  # of a try without a checkpoint
    meter = ThroughputMonitor(every=cfg.trainer.log_every_n_steps)
    built = build_trainer(cfg, run_dir, callbacks, meter, facts, signals)
    defer_launch_signals(built)
    data.micro_batch(built.world_size, built.accumulate_grad_batches)  # says now what is wrong
    if isinstance(built.strategy, FullyShardedStrategy):
        built.strategy.check_module(module)
    for logger in built.loggers:
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
    return TrainingJob(data, module, built, meter, resume)


def build_trainer(
    cfg: DictConfig,
    run_dir: Path,
    callbacks: list[L.Callback],
    meter: ThroughputMonitor,
    facts: dict,
    signals: StopSignals | None = None,
) -> L.Trainer:
    """Lightning's Trainer with our checkpoints, meters and loggers."""
    best = {"metric": cfg.metric, "direction": cfg.direction}
    keeper = Checkpoints(run_dir / "checkpoints", **cfg.checkpoint, **best, facts=facts)
    report = run_dir / "bad_batches.json"
    skip = NonFiniteStepSkipper(report, monitor=meter, stop_after=cfg.stop_after_skips)
    when = {"every": meter.every, "max_hours": cfg.trainer.max_hours}
    stops = [PreemptionHandler(keeper.save_now, **when, signals=signals)]
    if cfg.early_stop:
        stops.append(instantiate(cfg.early_stop))
    loggers = [CsvLog(run_dir / "metrics.csv")]
    if cfg.logger:
        handed = {"run_dir": run_dir, "name": cfg.name, "overrides": get_command_line_overrides()}
        loggers.append(instantiate(cfg.logger, **handed))
    accumulate = cfg.trainer.accumulate_grad_batches
    return instantiate(
        OmegaConf.masked_copy(cfg.trainer, [key for key in cfg.trainer if key != "max_hours"]),
        **get_launched_devices(cfg),
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
            RandomLayerSeeding(cfg.seed),
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


def get_command_line_overrides() -> list[str]:
    """The settings that this run was given on the command line, without its name."""
    task = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    return [text for text in task if not text.startswith("name=")]


def get_launched_devices(cfg: DictConfig) -> dict[str, int]:
    """Devices and machines where torchrun or srun has started the processes; else nothing.

    Raises UsageError where the configuration asks for others.
    """
    if (started := get_launcher_layout()) is None:
        return {}
    asked = cfg.trainer.devices, cfg.trainer.num_nodes
    if asked[0] != "auto" and asked not in ((1, 1), started):
        raise UsageError(
            f"{started[0]} processes on each of {started[1]} machines were started, and "
            f"trainer.devices={asked[0]}, trainer.num_nodes={asked[1]} ask for others: leave them "
            "out, the launcher's numbers are taken"
        )
    return {"devices": started[0], "num_nodes": started[1]}
