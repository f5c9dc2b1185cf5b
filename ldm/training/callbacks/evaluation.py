"""Evaluation of generated images at the validations of a run."""

import shutil
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import lightning as L
import torch
from torch import nn
from tqdm.auto import tqdm

from ldm.data.dataset import TextImageDataset
from ldm.evaluation.distributed import ProcessGroup
from ldm.evaluation.features.base import FeatureExtractor
from ldm.evaluation.image_metrics import ImageMetric
from ldm.evaluation.protocol import EvaluationProtocol, select_prompt_subset
from ldm.evaluation.scenes.accuracy import ScenePromptAccuracy
from ldm.evaluation.scenes.motion import MotionPromptAccuracy
from ldm.evaluation.tensor_cache import hash_facts
from ldm.inference.pipeline import Pipeline
from ldm.models.text.cached import CachedTextEncoder
from ldm.training.callbacks.preemption import PreemptionHandler
from ldm.training.fsdp import FullyShardedStrategy
from ldm.utils.files import resolve_path
from ldm.utils.hashing import hash_module


class SceneAccuracy(L.Callback):
    """Logs val/scene_* of ScenePromptAccuracy at each `every`-th and at the last validation.

    Validations are counted from the start of the run, with the one before the first step. Each
    rank generates a share of the images. The images depend on the weights only, not on the random
    state of the training. moving: MotionPromptAccuracy's metrics, as val/motion_*.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        size: int,
        count: int,
        steps: int,
        batch: int,
        every: int = 1,
        moving: bool = False,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be 1 or more, got {every}")
        self.pipeline = pipeline
        self.size, self.steps, self.every = size, steps, every
        kind = MotionPromptAccuracy if moving else ScenePromptAccuracy
        self.scenes = kind(count=count, batch=batch)
        self.logged_metrics: set[str] = set()

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        drop_stale_metrics(trainer, self.logged_metrics)

    def on_validation_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self.is_due(trainer):
            return
        items = range(trainer.global_rank, len(self.scenes), trainer.world_size)
        hidden = None if trainer.is_global_zero else True  # None: hidden if not in a terminal
        total = len(items) * self.steps
        with tqdm(total=total, desc="Scenes", unit="step", leave=False, disable=hidden) as bar:
            generate = partial(
                self.pipeline,
                size=self.size,
                steps=self.steps,
                on_step=lambda i, x0_hat: bar.update(len(x0_hat)),
            )
            counts = torch.from_numpy(self.scenes.tally(generate, items)).to(module.device)
        counts = trainer.strategy.reduce(counts, reduce_op="sum").cpu().numpy()
        for name, value in self.scenes.metrics(counts).items():
            module.log(f"val/{name}", value, sync_dist=True)  # the same on all ranks
            self.logged_metrics.add(f"val/{name}")

    def is_due(self, trainer: L.Trainer) -> bool:
        """A function of the step only, so a resumed run measures at the same steps."""
        if trainer.global_step >= trainer.max_steps > 0:
            return True
        batches = trainer.global_step * trainer.accumulate_grad_batches
        validations = batches // (trainer.val_check_batch or 1)  # None before the first step
        return validations % self.every == 0


class ImageQuality(L.Callback):
    """Logs EvaluationProtocol's metrics as val/*, of the averaged weights, and if `raw` of both.

    It does so at the first validation, at the last, and at each one after a multiple of `every`
    images seen (0: at each). It generates images of `count` captions of `images` in `steps` steps,
    each rank a share, and compares them with at most `real` of `reference_images`.
    `folder` holds the features of generated images until all of them are measured. A run that was
    ended in between continues from them if its weights and `settings` (all else that an image
    depends on, as text) are the same. folder/subset-*.json lists the captions.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        networks: Sequence[FeatureExtractor],
        *,
        images: TextImageDataset,
        reference_images: TextImageDataset,
        size: int,
        folder: Path,
        settings: str,
        raw_denoiser: nn.Module | None = None,
        count: int,
        steps: int,
        every: int,
        real: int,
        batch: int,
        raw: bool,
        cache: str,
        metrics: Mapping[str, ImageMetric] | None = None,
    ) -> None:
        if every < 0:
            raise ValueError(f"every is a number of images, 0 or more, got {every}")
        text_encoder = CachedTextEncoder(pipeline.components.text_encoder)
        pipeline = pipeline.replace_components(text_encoder=text_encoder)
        self.pipelines = {"": pipeline}
        if raw:
            self.pipelines["_raw"] = pipeline.replace_components(denoiser=raw_denoiser)
        self.size, self.steps, self.every = size, steps, every
        self.folder, self.settings = folder, settings
        self.logged_metrics: set[str] = set()
        self.quality = EvaluationProtocol(
            networks,
            dataset=images,
            others=reference_images,
            subset=select_prompt_subset(images, reference_images, count),
            size=size,
            cache=resolve_path(cache),
            at_most=real,
            batch=batch,
            metrics=metrics,
        )

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if len(self.pipelines) > 1 and isinstance(trainer.strategy, FullyShardedStrategy):
            raise ValueError("strategy=fsdp measures the average alone: take eval.images.raw=false")

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        drop_stale_metrics(trainer, self.logged_metrics)

    def on_validation_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self.is_due(trainer):
            return
        if trainer.is_global_zero:
            self._save_subset()
        hidden = None if trainer.is_global_zero else True
        with tqdm(desc="Reference", unit="image", leave=False, disable=hidden, delay=1) as bar:
            self.quality.prepare(module.device, done=partial(self._update_progress, trainer, bar))
        share = -(-len(self.quality.subset) // trainer.world_size) * len(self.pipelines)
        with tqdm(total=share, desc="Generating", unit="image", leave=False, disable=hidden) as bar:
            done = partial(self._update_progress, trainer, bar)
            for suffix, pipeline in self.pipelines.items():
                generate = partial(pipeline, size=self.size, steps=self.steps)
                folder = self.find_feature_folder(trainer.global_step, pipeline.components.denoiser)
                seen = self.quality.extract_features(generate, folder=folder, done=done)
                self._log(module, self.quality.measure(seen), suffix)
        if trainer.is_global_zero:
            self._clear(trainer.global_step)

    def find_feature_folder(self, step: int, denoiser: nn.Module) -> Path:
        """Returns the folder for features of this step's images; all ranks take part.

        Its name holds a digest of the weights, because a run may have resumed from before the step.
        """
        facts = [self.quality.facts(), self.settings, self.size, self.steps]
        weights = ProcessGroup().share(hash_module(denoiser) if ProcessGroup().rank == 0 else None)
        return self.folder / f"step={step:08d}-{hash_facts([*facts, weights])}"

    def is_due(self, trainer: L.Trainer) -> bool:
        """A function of the step only, so a resumed run measures at the same steps."""
        step, seen = trainer.global_step, trainer.datamodule.batch_size
        if self.every == 0 or step == 0 or step >= trainer.max_steps > 0:
            return True
        before = step - trainer.val_check_interval // trainer.accumulate_grad_batches
        return step * seen // self.every > before * seen // self.every

    def _update_progress(self, trainer: L.Trainer, bar: tqdm, items: range) -> None:
        bar.update(len(items))
        for callback in trainer.callbacks:
            if isinstance(callback, PreemptionHandler):
                callback.exit_if_signalled(trainer)

    def _clear(self, step: int) -> None:
        """Removes the features of this step, and of earlier steps that were not measured."""
        for path in self.folder.glob("step=*"):
            if path.name <= f"step={step:08d}~":
                shutil.rmtree(path, ignore_errors=True)

    def _save_subset(self) -> None:
        subset = self.quality.subset
        path = self.folder / f"subset-{subset.digest}.json"
        try:
            subset.save(path)
        except OSError as error:  # a full disk must not end the training
            warnings.warn(f"{path} cannot be written: {error.strerror or error}", stacklevel=2)

    def _log(self, module: L.LightningModule, metrics: Mapping[str, float], suffix: str) -> None:
        for name, value in metrics.items():
            if not (suffix and name.endswith(("_floor", "_real"))):
                module.log(f"val/{name}{suffix}", value)
                self.logged_metrics.add(f"val/{name}{suffix}")


def drop_stale_metrics(trainer: L.Trainer, names: set[str]) -> None:
    """Removes metrics of an earlier validation, which this one may not measure.

    Best checkpoints and early stopping would take them for values of this validation.
    """
    for name in names:
        trainer.callback_metrics.pop(name, None)
