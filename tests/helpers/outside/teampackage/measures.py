"""Callback, metric and evaluation."""

import lightning as L


class BatchCounter(L.Callback):
    """Logs how many batches the run has seen, also before it was resumed."""

    def __init__(self, *, start: int = 0) -> None:
        self.batches = start

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.batches += 1
        module.log("team/batches", float(self.batches))

    def state_dict(self):
        return {"batches": self.batches}

    def load_state_dict(self, state):
        self.batches = state["batches"]


class BrightnessGap:
    """The mean grey level of generated images, and its distance from that of real ones."""

    def update(self, images, captions, real):
        assert len(captions) == len(images)
        self.levels[real] += images.float().mean((1, 2, 3)).tolist()

    def compute(self):
        means = [sum(levels) / len(levels) for levels in self.levels]
        return {"level": means[0], "gap": means[0] - means[1]}

    def reset(self):
        self.levels = [[], []]


class RedCircle(L.Callback):
    """Logs the mean of one image at each validation."""

    def __init__(self, pipeline, *, data, folder, steps: int = 1) -> None:
        self.pipeline, self.size, self.steps = pipeline, data.size, steps

    def on_validation_epoch_end(self, trainer, module):
        image = self.pipeline(["a red circle"], seeds=[0], size=self.size, steps=self.steps)
        module.log("val/red_circle", image.mean(), sync_dist=True)
