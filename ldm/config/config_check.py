"""The check of a command's configuration; Hydra calls it before it makes the run directory."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path

from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, QuotedString
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from yaml import YAMLError

from ldm.config.command_line import (
    USAGE_ERRORS,
    delete_replaced_settings,
    exit_with_usage_error,
    print_note,
    quote_override,
)
from ldm.config.composition import compose_default_config, drop_hydra_settings, list_task_words
from ldm.config.metric_check import check_metric_names
from ldm.config.own_components import DIFFUSION_GROUPS, check_own_component, check_setting_names
from ldm.config.ranges import OWN_TARGET_PREFIXES, find_setting_rule, format_invalid_value
from ldm.config.reserved_settings import (
    ADAMW_8BIT_TARGET,
    DENOISER_SETTINGS,
    NAMED_COMPONENT_GROUPS,
    RESERVED_SETTINGS,
)
from ldm.config.search_path import is_config_group
from ldm.config.suggestions import (
    check_group_option,
    explain_composition_error,
    explain_hydra_error,
    format_unknown_setting,
)
from ldm.config.trust import check_own_packages, find_user_config_file, list_trusted_packages
from ldm.config.value_rules import format_setting_value
from ldm.experiments.former_names import FORMER_SETTINGS, update_override
from ldm.experiments.new_directories import register_new_directories
from ldm.experiments.run_dir import FIXED_RUN_FILES
from ldm.utils.errors import UsageError
from ldm.utils.files import check_no_links, check_path_length

LOGGER_PACKAGES = ("tensorboard", "mlflow")  # loggers of the same names
NAMED_COMPONENT_PREFIXES = tuple(f"{group}." for group in NAMED_COMPONENT_GROUPS)


class ConfigCheckCallback(Callback):
    """Exits with code 2 where `check_config` refuses; command: the name of the configuration.

    Hydra makes warnings of a callback's exceptions, so that the messages are printed here.
    """

    def __init__(self, command: str) -> None:
        self.command = command

    def on_run_start(self, config: DictConfig, **more: object) -> None:
        """Checks one run."""
        self._check(config, [])

    def on_multirun_start(self, config: DictConfig, **more: object) -> None:
        """Checks what all jobs of a sweep share; the plan of the sweep checks each job."""
        parsed = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        self._check(config, [override for override in parsed if override.is_sweep_override()])

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **more: object) -> None:
        """Prints a refusal of `main`, before which Hydra would print a line of its own."""
        error = job_return._return_value  # `return_value`, of Hydra 1.3, prints and then raises it
        if isinstance(error, USAGE_ERRORS):
            exit_with_usage_error(error, self.command)

    def _check(self, config: DictConfig, swept: list[Override]) -> None:
        try:
            lines = [override.input_line for override in swept]
            typed = [line for line in config.hydra.overrides.task if line not in lines]
            own = drop_hydra_settings(config)
            check_added_hydra_settings(config)
            check_config(own, self.command, typed, swept=bool(swept))
            for key, value, default in [
                *iterate_sweep_values(swept, own),
                *iterate_launcher_settings(config, bool(swept)),
            ]:
                if message := format_invalid_value(key, value, self.command, default=default):
                    raise UsageError(message)
            if self.command == "train":
                if own.plan:
                    from ldm.config.plan import exit_with_plan  # torch

                    exit_with_plan(own, is_sweep=bool(swept))
                check_run_directory(Path(config.hydra.run.dir))
                settings = OmegaConf.to_container(own, resolve=True)
                if packages := ", ".join(check_own_packages(settings)):
                    print_note(
                        f"this run uses components of {packages}: commands that read it need "
                        f"trust=[{packages}], or the line `trust: [{packages}]` in "
                        f"{find_user_config_file()}"
                    )
            if config.hydra.output_subdir is not None and not swept:
                register_new_directories(Path(config.hydra.run.dir))
        except USAGE_ERRORS as error:
            exit_with_usage_error(error, self.command)


def check_run_directory(directory: Path) -> None:
    """UsageError where a file that a run or a sweep writes is a link."""
    try:
        check_no_links(directory, FIXED_RUN_FILES)
    except ValueError as error:
        raise UsageError(str(error)) from error


def iterate_sweep_values(
    swept: list[Override], config: DictConfig
) -> Iterator[tuple[str, object, object]]:
    """Key, value and default of all swept settings; of an interval, its ends."""
    for override in swept:
        key, sweep = override.get_key_element().lstrip("+"), override.value()
        if is_config_group(key):
            continue
        if isinstance(sweep, IntervalSweep):
            values = [sweep.start, sweep.end]
        else:
            values = override.sweep_iterator()
        for value in values:
            value = value.text if isinstance(value, QuotedString) else value
            yield key, value, OmegaConf.select(config, key)


def iterate_launcher_settings(
    config: DictConfig, sweeps: bool
) -> Iterator[tuple[str, object, object]]:
    """Key and value of each number of a sweep's launcher and sweeper, without a default."""
    for part in ("launcher", "sweeper", "sweeper.sampler") if sweeps else ():
        for key in OmegaConf.select(config, f"hydra.{part}") or ():
            name = f"hydra.{part}.{key}"
            if find_setting_rule(name, "train"):
                yield name, OmegaConf.select(config, name), ...


def check_config(
    cfg: DictConfig,
    config_name: str,
    overrides: Iterable[str] | None = None,
    *,
    swept: bool = False,
) -> None:
    """UsageError for keys that nobody reads and for invalid values.

    overrides: the command line that `cfg` was composed of; None: this process's own. swept: the
    jobs have other values, so that what one setting says of another is checked for each of them.
    """
    overrides = list_task_words() if overrides is None else overrides
    try:
        settings = OmegaConf.to_container(cfg, resolve=True)
    except InterpolationResolutionError as error:
        raise UsageError(f"{error.full_key}: {error.msg.splitlines()[0]}") from error
    default = compose_default_config(config_name, overrides)
    if left_out := [key for key in default if key not in settings]:
        raise UsageError(f"~{left_out[0]}: a setting cannot be left out, it has another value")
    _check_settings(settings, default, "", config_name)
    if config_name == "train":
        check_run_name(cfg.name)
        check_needed_components(settings)
        check_optional_packages(settings)
    check_named_components(settings)
    if config_name == "train" and not swept:
        check_evaluation_settings(settings, overrides)
        check_metric_names(settings)
    if cfg.get("direction") not in (None, "minimize", "maximize"):
        raise UsageError(f"direction={cfg.direction} is neither minimize nor maximize")
    if "trust" in cfg:
        list_trusted_packages(cfg)


def compose_config(command: str, overrides: Sequence[str]) -> DictConfig:
    """The checked settings of a command, or UsageError; call it where Hydra is initialized."""
    words = [quote_override(update_override(word)) for word in overrides]
    try:
        for word in words:
            if word.lstrip("+").startswith("hydra.searchpath="):
                raise UsageError(
                    f"{word}: the command line takes folders of options. Python finds those of "
                    "installed packages, by the entry point ldm.conf"
                )
            check_group_option(*word.partition("=")[::2])
        words += delete_replaced_settings(words, command)
        cfg = compose(command, words)
        check_config(cfg, command, words)
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(explain_hydra_error(error, command)) from error
    except (ValueError, YAMLError) as error:
        message = explain_composition_error(error, command, words)
        if message is None or isinstance(error, UsageError):
            raise
        raise UsageError(message) from error
    return cfg


def check_added_hydra_settings(config: DictConfig) -> None:
    """UsageError for a setting of Hydra that a user added and that Hydra does not know."""
    for word in config.hydra.overrides.hydra:
        key = word.lstrip("+").partition("=")[0]
        place, _, leaf = key.rpartition(".")
        node = OmegaConf.select(config, place) if word[0] == "+" else None
        kind = OmegaConf.get_type(node)
        if is_dataclass(kind) and leaf not in {field.name for field in fields(kind)}:
            raise UsageError(format_unknown_setting(key, "train"))
        if kind is dict and "_target_" in node:
            check_setting_names([leaf], place, node["_target_"], node)


def check_optional_packages(settings: dict) -> None:
    """Raises UsageError for a logger, an optimizer or LoRA whose package is not installed."""
    if settings["optimizer"]["_target_"] == ADAMW_8BIT_TARGET and find_spec("torchao") is None:
        raise UsageError("optimizer=adamw8bit needs a package: pip install torchao")
    if settings["lora"]["rank"] and find_spec("peft") is None:
        raise UsageError(f"lora.rank={settings['lora']['rank']} needs a package: pip install peft")
    for name in settings["logger"] or {}:
        if name in LOGGER_PACKAGES and find_spec(name) is None:
            raise UsageError(f"logger={name} needs a package: pip install {name}")


def check_needed_components(settings: dict) -> None:
    """UsageError for an option of a needed component whose file names none."""
    for group in (*DIFFUSION_GROUPS, "sampler", "guidance", "optimizer", "data"):
        node = settings.get(group)
        if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
            raise UsageError(
                f"{group}: this option's file names no component, with a line such as "
                "`_target_: mypackage.module.Class`"
            )


def check_named_components(settings: dict) -> None:
    """UsageError for a key of NAMED_COMPONENT_GROUPS without a component."""
    for group in NAMED_COMPONENT_GROUPS:
        for name, node in (settings.get(group) or {}).items():
            if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
                raise UsageError(
                    f"{group}.{name} names no component: give "
                    f"'+{group}.{name}._target_=mypackage.module.Class'"
                )


def check_evaluation_settings(settings: dict, overrides: Iterable[str]) -> None:
    """UsageError for settings of generated images that this training does not read."""
    stage = settings["stage"]
    if stage == "diffusion" and "images" in settings["eval"]:
        return
    for word in overrides:
        key, _, value = word.lstrip("+~").partition("=")
        key = key.partition(".")[0]
        if key not in DENOISER_SETTINGS or value in ("none", "null", "[]", "", "[none]"):
            continue
        if stage != "diffusion":
            raise UsageError(
                f"{word}: stage={stage} trains no denoiser and reads nothing of {key}: leave it out"
            )
        if key in ("features", "metrics"):
            raise UsageError(
                f"{word}: {key} are of the images of eval=fast or eval=full: add one, as in "
                "eval=fast or eval='[scenes,fast]'"
            )


def check_run_name(name: object) -> None:
    """UsageError for names that are no path below runs/, or too long for one."""
    is_text = isinstance(name, str | int | float) and str(name).isprintable()
    if not is_text or not str(name).strip("./ ") or {"..", ""} & set(str(name).split("/")):
        value = ascii(name) if isinstance(name, str) else format_setting_value(name)
        value = f"'{name}'" if is_text else value
        raise UsageError(f"name={value} names no run: leave it out, or give name=my-run")
    try:
        check_path_length("name", Path("runs", str(name)))
    except ValueError as error:
        raise UsageError(str(error)) from error


def _check_settings(
    settings: dict, default: dict, prefix: str, config_name: str, ours: bool = True
) -> None:
    """UsageError for the first setting that nobody reads or that is invalid."""
    target = settings.get("_target_")
    ours = target.startswith(OWN_TARGET_PREFIXES) if isinstance(target, str) else ours
    for key, value in settings.items():
        name, usual = f"{prefix}{key}", default.get(key, ...)
        if ours and (today := FORMER_SETTINGS.get(name)):  # in a file of the user's
            raise UsageError(f"the setting {name} is called {today} now")
        if remedy := RESERVED_SETTINGS.get(name):
            raise UsageError(f"{name} is set by the run itself: {remedy}")
        if usual is ... and "_target_" not in default and prefix not in NAMED_COMPONENT_PREFIXES:
            raise UsageError(format_unknown_setting(name, config_name))
        is_none = usual == {} and name not in NAMED_COMPONENT_GROUPS
        if is_none and isinstance(value, dict) and value and "_target_" not in value:
            raise UsageError(format_unknown_setting(f"{name}.{next(iter(value))}", config_name))
        if prefix in NAMED_COMPONENT_PREFIXES and usual is ... and isinstance(value, dict):
            usual = value  # a component that the command line adds
        if isinstance(usual, dict) and (usual or name in NAMED_COMPONENT_GROUPS):
            if not isinstance(value, dict):
                inside = ", ".join(f"{name}.{key}" for key in usual if key != "_target_")
                raise UsageError(
                    f"{name}={format_setting_value(value)} is no single value, there are: {inside}"
                )
            _check_settings(value, usual, f"{name}.", config_name, ours)
        elif message := format_invalid_value(name, value, config_name, default=usual, ours=ours):
            raise UsageError(message)
    place, added = prefix.rstrip("."), [key for key in settings if key not in default]
    if target is not None and not ours:
        check_own_component(settings, place, default)
    elif target is not None and added:
        check_setting_names(added, place, target, default)
