"""The first thing that happens to a command's configuration: it is checked, and nothing is written.

Hydra makes the run directory before it calls `main`, but calls this before that.
"""

from collections.abc import Iterator
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from ldm.config.command_line import USAGE_ERRORS, check_config, exit_with_usage_error
from ldm.config.leftovers import register_new_directories
from ldm.config.ranges import find_setting_rule, format_invalid_value
from ldm.config.suggestions import is_config_group
from ldm.experiments.run_dir import FIXED_RUN_FILES
from ldm.utils.errors import UsageError
from ldm.utils.files import check_no_links


class ConfigCheckCallback(Callback):
    """Refuses, with exit code 2, what `cli.check` refuses; command: the name of the configuration.

    Hydra makes warnings of a callback's exceptions, which are therefore told here.
    """

    def __init__(self, command: str) -> None:
        self.command = command

    def on_run_start(self, config: DictConfig, **more: object) -> None:
        """Check one run."""
        self._check(config, [])

    def on_multirun_start(self, config: DictConfig, **more: object) -> None:
        """Check what all jobs of a sweep have in common, its launcher, and each value of a number.

        What else is wrong with one job alone is found when the jobs are planned.
        """
        parsed = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        self._check(config, [override for override in parsed if override.is_sweep_override()])

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **more: object) -> None:
        """Tell what `main` has refused: Hydra would print a line of its own before it."""
        error = job_return._return_value  # `return_value`, of Hydra 1.3, prints and then raises it
        if isinstance(error, USAGE_ERRORS):
            exit_with_usage_error(error, self.command)

    def _check(self, config: DictConfig, swept: list[Override]) -> None:
        try:
            lines = [override.input_line for override in swept]
            typed = [line for line in config.hydra.overrides.task if line not in lines]
            own = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
            check_config(own, self.command, typed)
            for key, value, default in [
                *iterate_sweep_values(swept, own),
                *iterate_launcher_settings(config, bool(swept)),
            ]:
                if said := format_invalid_value(key, value, self.command, default=default):
                    raise UsageError(said)
            if self.command == "train":
                check_run_directory(Path(config.hydra.run.dir))
            if config.hydra.output_subdir is not None and not swept:
                register_new_directories(Path(config.hydra.run.dir))
        except USAGE_ERRORS as error:
            exit_with_usage_error(error, self.command)


def check_run_directory(directory: Path) -> None:
    """UsageError where a file that is written to in a run's or a sweep's directory is a link."""
    try:
        check_no_links(directory, FIXED_RUN_FILES)
    except ValueError as error:
        raise UsageError(str(error)) from error


def iterate_sweep_values(
    swept: list[Override], config: DictConfig
) -> Iterator[tuple[str, object, object]]:
    """Key, value and default of all that is swept and no option; of an interval, its ends."""
    for override in swept:
        key, sweep = override.get_key_element().lstrip("+"), override.value()
        if is_config_group(key):
            continue
        if isinstance(sweep, IntervalSweep):
            found = [sweep.start, sweep.end]
        else:
            found = override.sweep_iterator()
        for value in found:
            yield key, value, OmegaConf.select(config, key)


def iterate_launcher_settings(
    config: DictConfig, sweeps: bool
) -> Iterator[tuple[str, object, object]]:
    """Key and value of each number of a sweep's launcher and sweeper; there is no default."""
    for part in ("launcher", "sweeper", "sweeper.sampler") if sweeps else ():
        for key in OmegaConf.select(config, f"hydra.{part}") or ():
            name = f"hydra.{part}.{key}"
            if find_setting_rule(name, "train"):
                yield name, OmegaConf.select(config, name), ...
