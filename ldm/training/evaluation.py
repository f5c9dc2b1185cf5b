"""What is measured on pictures that a run paints while it trains."""

from functools import partial

import lightning as L
import torch
from tqdm import tqdm

from ldm.metrics.scene_accuracy import SceneAccuracy
from ldm.pipeline import Pipeline


class SceneCheck(L.Callback):
    """Logs SceneAccuracy's metrics as val/scene_* at every `every`-th validation and at the last.

    Validations are counted from the run's beginning, the one before the first step included. Each
    rank paints a share of the prompts. The pictures depend on the weights alone: they draw nothing
    from the random state of the training.
    """

    def __init__(
        self, pipeline: Pipeline, *, size: int, count: int, steps: int, batch: int, every: int = 1
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be 1 or more, got {every}")
        self.pipeline = pipeline
        self.size = size
        self.steps = steps
        self.every = every
        self.scenes = SceneAccuracy(count=count, batch=batch)

    def on_validation_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self.is_due(trainer):
            return
        items = range(trainer.global_rank, len(self.scenes), trainer.world_size)
        hidden = None if trainer.is_global_zero else True  # None: where nothing can be drawn over
        total = len(items) * self.steps
        with tqdm(total=total, desc="Scenes", unit="step", leave=False, disable=hidden) as bar:
            paint = partial(
                self.pipeline,
                size=self.size,
                steps=self.steps,
                on_step=lambda i, x0_hat: bar.update(len(x0_hat)),
            )
            counts = torch.from_numpy(self.scenes.tally(paint, items)).to(module.device)
        counts = trainer.strategy.reduce(counts, reduce_op="sum").cpu().numpy()
        for name, value in self.scenes.metrics(counts).items():
            module.log(f"val/{name}", value, sync_dist=True)  # the same on all ranks

    def is_due(self, trainer: L.Trainer) -> bool:
        """A function of the step alone, so that a resumed run measures when it would have."""
        if trainer.global_step >= trainer.max_steps > 0:
            return True
        batches = trainer.global_step * trainer.accumulate_grad_batches
        validations = batches // (trainer.val_check_batch or 1)  # None before the first step
        return validations % self.every == 0
