"""TensorBoard: event files in the run directory."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from ldm.training.loggers.base import RunLogger, keep_training


class TensorBoardRun(TensorBoardLogger, RunLogger):
    """Lightning's logger with images and tables, in <run_dir>/tensorboard.

    `tensorboard --logdir runs` shows all runs. An error of a write, as on a full disk, is printed
    once, and the training goes on.
    """

    def __init__(self, *, run_dir: Path) -> None:
        super().__init__(run_dir, name="tensorboard", version="", default_hp_metric=False)

    @rank_zero_only
    @keep_training("TensorBoard")
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, step)

    @rank_zero_only
    @keep_training("TensorBoard")
    def log_image(self, key: str, images: Sequence[Image.Image], step: int | None = None) -> None:
        for i, image in enumerate(images):
            name = key if len(images) == 1 else f"{key}/{i}"
            pixels = np.asarray(image.convert("RGB"))
            self.experiment.add_image(name, pixels, step, dataformats="HWC")

    @rank_zero_only
    @keep_training("TensorBoard")
    def log_table(self, key: str, columns: Sequence[str], data: Sequence[Sequence]) -> None:
        rows = [columns, ["---"] * len(columns), *data]
        cells = ([str(cell).replace("|", r"\|") for cell in row] for row in rows)
        self.experiment.add_text(key, "\n".join(f"| {' | '.join(row)} |" for row in cells))

    @rank_zero_only
    @keep_training("TensorBoard")
    def rewind(self, step: int) -> None:
        from tensorboard.compat.proto import event_pb2 as proto

        # A session that starts at a step has TensorBoard hide later events of earlier sessions.
        session = proto.SessionLog(status=proto.SessionLog.START)
        start = proto.Event(step=step + 1, session_log=session)
        self.experiment.file_writer.add_event(start, step + 1)

    @rank_zero_only
    @keep_training("TensorBoard")
    def save(self) -> None:
        super().save()

    def finalize(self, status: str) -> None:
        """Does nothing: Lightning calls it after the first validation, too."""

    @rank_zero_only
    @keep_training("TensorBoard")
    def finish(self, *, status: str) -> None:
        self.save()
        self.experiment.close()
