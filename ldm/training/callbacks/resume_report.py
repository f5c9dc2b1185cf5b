"""What becomes of the learning rate where a run resumes with more steps."""

import lightning as L

from ldm.utils.plain_yaml import parse_plain_mapping


class ResumeReport(L.Callback):
    """Prints the learning rate, before and now, of a resumed run whose `max_steps` was raised."""

    def __init__(self) -> None:
        self.max_steps: int | None = None  # of the call that wrote the checkpoint
        self.lr: float | None = None

    def on_load_checkpoint(self, trainer: L.Trainer, module, checkpoint: dict) -> None:
        config = parse_plain_mapping(checkpoint["ldm"].get("config", "{}"))
        self.max_steps = config.get("trainer", {}).get("max_steps")
        for state in checkpoint["lr_schedulers"][:1]:
            self.lr = state["_last_lr"][0]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.max_steps in (None, trainer.max_steps) or not trainer.is_global_zero:
            return
        lr, step = trainer.optimizers[0].param_groups[0]["lr"], trainer.global_step
        change = f"is {lr:.3g} at step {step}, as before"
        if self.lr not in (None, lr):
            change = f"was {self.lr:.3g} at step {step}, is {lr:.3g}: its curve has the new end"
        print(
            f"trainer.max_steps was {self.max_steps}, is {trainer.max_steps}: the learning rate "
            f"{change}",
            flush=True,
        )
