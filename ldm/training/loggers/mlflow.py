"""MLflow: a run of the tracking server, which a resumed training continues."""

import csv
import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import mlflow
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from PIL import Image

from ldm.training.loggers.base import RunLogger, format_first_line, keep_training, split_run_name
from ldm.training.loggers.run_ids import forget_copied_ids, read_run_id, write_run_id

# It warns that it creates an experiment which is not there.
logging.getLogger("lightning.pytorch.loggers.mlflow").setLevel(logging.ERROR)
MLFLOW_STATUS = {"finished": "FINISHED", "failed": "FAILED", "preempted": "KILLED"}


class MlflowRun(MLFlowLogger, RunLogger):
    """Lightning's logger with images and tables; the id of its run is in <run_dir>/mlflow_id.

    A setting that is null is left to MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME, then to
    MLflow's own store and the experiment `ldm`. Its tags are `sweep` and what the sweep varies.
    Raises ValueError if the store cannot be used; later errors are printed once.
    """

    def __init__(
        self,
        *,
        run_dir: Path,
        name: str,
        overrides: Sequence[str],
        tracking_uri: str | None = None,
        experiment_name: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        sweep, job, varied = split_run_name(name, overrides)
        own = {"sweep": sweep} if sweep else {}
        own |= {key: value for key, _, value in (text.partition("=") for text in varied)}
        forget_copied_ids(run_dir)
        self.id_file = run_dir / "mlflow_id"
        experiment_name = experiment_name or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "ldm"
        tracking_uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        with convert_mlflow_errors():
            super().__init__(
                experiment_name,
                job,
                tracking_uri or mlflow.get_tracking_uri(),
                tags=own | dict(tags or {}),
                run_id=read_run_id(self.id_file) if self.id_file.is_file() else None,
            )

    @property
    @rank_zero_experiment
    def experiment(self) -> MlflowClient:
        try:
            return super().experiment
        except MlflowException as error:  # another job of the sweep has just created it
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return super().experiment

    @rank_zero_only
    def log_hyperparams(self, params: Mapping) -> None:
        """Logs the settings of a new run; those of a resumed one cannot change any more."""
        with convert_mlflow_errors():
            if self.id_file.is_file():
                self.experiment.update_run(self.run_id, status="RUNNING")
            else:
                super().log_hyperparams(params)
                write_run_id(self.id_file, self.run_id)

    @rank_zero_only
    @keep_training("MLflow")
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, step)

    @rank_zero_only
    @keep_training("MLflow")
    def log_image(self, key: str, images: Sequence[Image.Image], step: int | None = None) -> None:
        for image in images:
            self.experiment.log_image(self.run_id, image, key=key, step=step)

    @rank_zero_only
    @keep_training("MLflow")
    def log_table(self, key: str, columns: Sequence[str], data: Sequence[Sequence]) -> None:
        text = io.StringIO()
        csv.writer(text).writerows([columns, *data])
        self.experiment.log_text(self.run_id, text.getvalue(), f"{key}.csv")

    def finalize(self, status: str = "success") -> None:
        """Does nothing: Lightning calls it after the first validation, too."""

    @rank_zero_only
    @keep_training("MLflow")
    def finish(self, *, status: str) -> None:
        self.experiment.set_terminated(self.run_id, MLFLOW_STATUS[status])


@contextmanager
def convert_mlflow_errors() -> Iterator[None]:
    """Turns MLflow's errors into ValueErrors of one line."""
    try:
        yield
    except (MlflowException, ImportError) as error:
        raise ValueError(f"logger=mlflow cannot be used: {format_first_line(error)}") from error
