"""What a run shows while it trains: metrics, a progress bar and sample images."""

import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from PIL import Image
from torch import Tensor

from ldm.data.dataset import Batch
from ldm.diffusion.rng import derive_seed
from ldm.models.random_layers import assign_image_positions, find_random_layers
from ldm.training.distributed import format_exception
from ldm.training.lightning_adapter import correct_logging_step, count_resumed_batches
from ldm.training.step_clock import StepClock, find_peak_tflops
from ldm.utils.images import save_png


class ThroughputMonitor(L.Callback):
    """Counts images, and logs loss and speed as means over the steps between two logging steps.

    Nothing is read from the device in between. Metrics: train/loss; images_seen; data/skipped
    (samples of the run that could not be read, over all ranks); perf/images_per_s; perf/step_ms;
    perf/data_wait (share of the training time spent waiting for data); perf/eval_share (share of
    this process's time spent on validations, metrics and sample images); perf/memory_gib (peak of
    the accelerator, absent without one); perf/share_data, _encoders, _denoiser, _backward and
    _optimizer (of the last step alone; _denoiser is the forward pass of what is trained);
    perf/mfu (share of `peak_tflops`, or of the peak of a known device, that the FLOPs of
    `count_flops` are; absent without one of them).
    count_flops: returns the FLOPs of a batch of one micro-step.
    """

    state_key = "Meter"  # its former name, under which checkpoints hold its state

    def __init__(
        self,
        *,
        every: int,
        peak_tflops: float | None = None,
        count_flops: Callable[[Batch], int] | None = None,
    ) -> None:
        self.every, self.peak_tflops, self.count_flops = every, peak_tflops, count_flops
        self.flops: dict[torch.Size, int] = {}  # of a micro-step, by the shape of its images
        self.clock = StepClock()
        self.latest: dict[str, float] = {}
        self.skipped = 0  # of all ranks, at the last logging step
        self.own_skipped = self.own_counted = 0  # of this process: all, and those in `skipped`

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.last_logged_step = trainer.global_step
        self.micro_steps = 0  # a run begins, and resumes, at a whole optimizer step
        for logger in trainer.loggers:
            logger.rewind(trainer.global_step)
        self.since, self.evaluated = time.perf_counter(), 0.0
        self.interrupted: float | None = None  # when a validation began that may not be over
        module.clock = self.clock
        if self.peak_tflops is None:
            self.peak_tflops = find_peak_tflops(module.device, str(trainer.precision))
        self._restart()
        self._start_clock(trainer)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._continue_training()
        share = {"perf/eval_share": self._eval_share()}
        self.latest = {**self.latest, **share}
        for logger in trainer.loggers:
            logger.log_metrics(share, step=trainer.global_step)

    def _restart(self) -> None:
        self.losses: list[Tensor] = []  # of the micro-steps, on the device
        self.images, self.computed, self.waited = 0, 0, 0.0
        self.began = self.ended = time.perf_counter()

    def _start_clock(self, trainer: L.Trainer) -> None:
        """Measures the parts of the next step if it will be logged."""
        if trainer.global_step + 1 >= self.last_logged_step + self.every:
            self.clock.start(trainer.strategy.root_device)

    def _continue_training(self) -> None:
        """Ends a validation, which includes the sample images after it."""
        if self.interrupted is not None:
            self.evaluated += time.perf_counter() - self.interrupted
            self.interrupted = None
            self._restart()

    def _eval_share(self) -> float:
        return self.evaluated / (time.perf_counter() - self.since)

    def on_train_batch_start(self, trainer: L.Trainer, module, batch: dict, batch_idx: int) -> None:
        self._continue_training()
        self.clock.mark("data")
        self.waited += time.perf_counter() - self.ended
        completes = (self.micro_steps + 1) % trainer.accumulate_grad_batches == 0
        if completes and trainer.global_step + 1 >= trainer.max_steps > 0:
            trainer.val_check_batch = 1  # the last step is always validated
        if self.peak_tflops and self.count_flops is not None:
            images = batch["moments"][0] if "moments" in batch else batch["images"]
            if images.shape not in self.flops:
                self.flops[images.shape] = self._count_flops(self.count_flops, batch)
            self.computed += self.flops[images.shape]

    def _count_flops(self, count: Callable[[Batch], int], batch: Batch) -> int:
        try:
            return count(batch)
        except Exception as error:  # of a network of the user's
            self.count_flops = None
            reason = format_exception(error).splitlines()[0]
            warnings.warn(f"perf/mfu is left out: FLOPs cannot be counted ({reason})", stacklevel=2)
            return 0

    def on_before_backward(self, trainer: L.Trainer, module, loss) -> None:
        self.clock.mark("denoiser")

    def on_after_backward(self, trainer: L.Trainer, module) -> None:
        self.clock.mark("backward")

    def on_train_batch_end(self, trainer: L.Trainer, module, outputs, batch, batch_idx) -> None:
        self.clock.mark("optimizer")
        self.ended = time.perf_counter()
        self.micro_steps += 1
        self.losses.append(outputs["loss"].detach())
        images, data = len(batch["captions"]) * trainer.world_size, trainer.datamodule
        self.images += images
        data.position += images
        self.own_skipped = data.train_skips.total
        if trainer.global_step >= self.last_logged_step + self.every:
            self._log(trainer)
        if self.micro_steps % trainer.accumulate_grad_batches == 0:
            self._start_clock(trainer)

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            if self.losses:
                self._log(trainer)
            self.clock.stop()
            self.interrupted = time.perf_counter()
        elif trainer.state.fn == "validate":  # W&B plots the first validation against it
            for logger in trainer.loggers:
                seen = {"images_seen": trainer.datamodule.position}
                logger.log_metrics(seen, step=trainer.global_step)

    def on_validation_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # Lightning would log a validation under the number of batches, which lags behind.
        module.log("step", float(trainer.global_step), sync_dist=True)

    def _log(self, trainer: L.Trainer) -> None:
        # Lightning's outputs["loss"] is divided by the number of accumulated batches.
        loss = torch.stack(self.losses).mean() * trainer.accumulate_grad_batches
        loss = trainer.strategy.reduce(loss, reduce_op="mean")
        mean_loss = float(loss)  # waits until the device has ended these steps
        seconds = time.perf_counter() - self.began
        micro_step = seconds / len(self.losses)
        new = torch.tensor(float(self.own_skipped - self.own_counted), device=loss.device)
        self.skipped += int(trainer.strategy.reduce(new, reduce_op="sum"))
        self.own_counted = self.own_skipped
        self.latest = {
            "train/loss": mean_loss,
            "images_seen": trainer.datamodule.position,
            "data/skipped": self.skipped,
            "perf/images_per_s": self.images / seconds,
            "perf/step_ms": 1000 * micro_step * trainer.accumulate_grad_batches,
            "perf/data_wait": self.waited / seconds,
            "perf/eval_share": self._eval_share(),
            **{f"perf/share_{part}": share for part, share in self.clock.read_shares().items()},
        }
        if self.computed and self.count_flops is not None:
            self.latest["perf/mfu"] = self.computed / seconds / (self.peak_tflops * 1e12)
        if torch.cuda.is_available():
            self.latest["perf/memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        for logger in trainer.loggers:
            logger.log_metrics(self.latest, step=trainer.global_step)
        self.last_logged_step = trainer.global_step
        self._restart()

    def state_dict(self) -> dict:
        return {"skipped": self.skipped + self.own_skipped - self.own_counted}

    def load_state_dict(self, state: dict) -> None:
        self.skipped = state["skipped"]


class RandomLayerSeeding(L.Callback):
    """Makes what networks draw in training (dropout) a function of the seed and of each image.

    Our random layers get the positions of the images. Layers of other libraries use the global
    random state: it is seeded by the position of the first image of this rank's batch, so their
    numbers depend on the number of devices.
    """

    def __init__(self, seed: int, rng: str = "philox") -> None:
        self.seed, self.rng = seed, rng

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.layers = find_random_layers(module)

    def on_train_batch_start(self, trainer: L.Trainer, module, batch: dict, batch_idx: int) -> None:
        seed = derive_seed(self.seed, batch["position"][0], stream="modules")
        seed_default_generators(module.device, seed)
        if self.layers:
            how = {"device": module.device, "rng": self.rng}
            assign_image_positions(self.layers, self.seed, batch["position"], **how)


def seed_default_generators(device: torch.device, seed: int) -> None:
    """Seeds the generators of the CPU and of `device` as torch.manual_seed does, which is slow."""
    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


class StepCounter(L.Callback):
    """Has Lightning log what a user's callbacks log in training under the right optimizer step.

    Lightning would take the step before, whose row is written already.
    """

    def on_train_batch_start(self, trainer: L.Trainer, module, batch: dict, batch_idx: int) -> None:
        correct_logging_step(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, module, outputs, batch, batch_idx) -> None:
        # Only where Lightning logs: on a GPU this waits for the device.
        if trainer.global_step % trainer.log_every_n_steps == 0 or trainer.should_stop:
            module.log("step", float(trainer.global_step))


class ProgressBar(TQDMProgressBar):
    """One bar for the whole run, with loss and speed."""

    def __init__(self, monitor: ThroughputMonitor) -> None:
        # Output to a file gets a line now and then.
        super().__init__(refresh_rate=1 if sys.stdout.isatty() else monitor.every)
        self.monitor = monitor

    @property
    def total_train_batches(self) -> int | float:
        """Returns the batches of the remaining steps; Lightning takes a step for a batch."""
        left = self.trainer.max_steps - self.trainer.global_step
        batches = self.trainer.num_training_batches
        return min(batches, left * self.trainer.accumulate_grad_batches) if left > 0 else batches

    def on_train_start(self, trainer: L.Trainer, *args) -> None:
        super().on_train_start(trainer, *args)
        if (done := count_resumed_batches(trainer)) is not None:
            self.train_progress_bar.reset(total=done + self.total_train_batches)
            self.train_progress_bar.n = self.train_progress_bar.initial = done

    def on_train_epoch_start(self, trainer: L.Trainer, *args) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description("Training")

    def get_metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict:
        metrics = super().get_metrics(trainer, module)
        metrics.pop("v_num", None)
        metrics.pop("step", None)
        if "train/loss" in self.monitor.latest:
            metrics["loss"] = f"{self.monitor.latest['train/loss']:.3f}"
            metrics["images/s"] = f"{self.monitor.latest['perf/images_per_s']:.0f}"
        return metrics


class SampleImages(L.Callback):
    """After each validation, writes one image to <folder>/step=*.png and to the loggers.

    draw: returns the image and the facts that its file carries. A file that cannot be written, on
    a full disk, gives one warning, and the training goes on.
    """

    def __init__(self, folder: Path, draw: Callable[[], tuple[Image.Image, dict]]) -> None:
        self.folder = folder
        self.draw = draw
        self.has_warned = False

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        image, facts = self.draw()
        path = self.folder / f"step={trainer.global_step:08d}.png"
        try:
            save_png(image, path, {**facts, "step": trainer.global_step})
        except OSError as error:
            if not self.has_warned:
                message = f"{path} cannot be written ({error.strerror or error})"
                warnings.warn(f"{message}; the training goes on", stacklevel=2)
            self.has_warned = True
        for logger in trainer.loggers:
            logger.log_image("samples", [image], step=trainer.global_step)
