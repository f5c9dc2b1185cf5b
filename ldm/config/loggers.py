"""Configuration to the loggers of a run."""

from pathlib import Path

from hydra.utils import instantiate
from lightning.pytorch.loggers.logger import Logger
from omegaconf import DictConfig

from ldm.config.composition import list_task_words
from ldm.config.own_components import import_component, list_parameters
from ldm.training.loggers.base import add_run_methods
from ldm.training.loggers.csv import CsvLog
from ldm.utils.errors import UsageError


def build_loggers(cfg: DictConfig, run_dir: Path) -> list[Logger]:
    """Returns the writer of metrics.csv and the loggers of `cfg.logger`, each under its own key.

    A logger gets what its signature names of `run_dir`, `name` and `overrides`, unless it is set.
    """
    run = {"run_dir": run_dir, "name": cfg.name, "overrides": get_command_line_overrides()}
    loggers: list[Logger] = [CsvLog(run_dir / "metrics.csv")]
    for key, option in (cfg.logger or {}).items():
        target = import_component(option["_target_"], f"logger.{key}")
        names = {each.name for each in list_parameters(target)}
        given = {name: run[name] for name in run if name in names and name not in option}
        logger = instantiate(option, **given)
        if not isinstance(logger, Logger):
            raise UsageError(
                f"logger.{key}: {option['_target_']} is no lightning.pytorch.loggers.Logger"
            )
        loggers.append(add_run_methods(logger))
    return loggers


def get_command_line_overrides() -> list[str]:
    """Returns the settings of the command line, without the run's name."""
    return [text for text in list_task_words() if not text.startswith("name=")]
