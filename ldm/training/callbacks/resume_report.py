"""What becomes of the learning rate where a run resumes with more steps."""

import lightning as L

from ldm.experiments.progress import print_above_progress
from ldm.utils.plain_yaml import parse_plain_mapping


class ResumeReport(L.Callback):
    """Prints the learning rate, before and now, of a resumed run with another `max_steps`."""

    def __init__(self) -> None:
        self.config: dict = {}  # of the call that wrote the checkpoint
        self.lr: float | None = None

    def on_load_checkpoint(self, trainer: L.Trainer, module, checkpoint: dict) -> None:
        self.config = parse_plain_mapping(checkpoint["ldm"].get("config", "{}"))
        for state in checkpoint["lr_schedulers"][:1]:
            self.lr = state["_last_lr"][0]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        steps, before = trainer.max_steps, self.config.get("trainer", {}).get("max_steps")
        if before in (None, steps) or not trainer.is_global_zero:
            return
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        change = f"stays {lr:.3g}" if self.lr in (None, lr) else f"was {self.lr:.3g}, is {lr:.3g}"
        if self.config.get("optimizer", {}).get("decay") == "cosine":
            change += f"; optimizer.decay=cosine now falls to 0 at step {steps}"
        print_above_progress(
            f"trainer.max_steps was {before}, is {steps}: the learning rate at step "
            f"{trainer.global_step} {change}"
        )
