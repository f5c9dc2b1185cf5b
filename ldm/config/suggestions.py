"""The settings and options that exist, and messages about those that do not."""

import difflib
import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from hydra import compose
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from ldm.config.composition import compose_default_config, isolate_hydra
from ldm.config.reserved_settings import NAMED_COMPONENT_GROUPS
from ldm.config.search_path import (
    is_config_group,
    list_chosen_options,
    list_config_directories,
    list_group_options,
)
from ldm.experiments.run_dir import parse_number
from ldm.utils.errors import UsageError, format_program, suggest_nearest
from ldm.utils.text import escape_control_characters

# Options of Hydra's plugins that ldm[sweep] brings along.
SWEEP_PACKAGES = {"optuna": "hydra-optuna-sweeper", "submitit_slurm": "hydra-submitit-launcher"}
OWN_DATA_HINT = " (for shards in a folder, give data=shards data.train=DIR data.val=DIR)"


def check_group_option(group: str, value: str) -> None:
    """UsageError for what names no option of a group, as guidance=7 or eval=null."""
    if not group.lstrip("+~").partition("@")[0]:
        raise UsageError(f"'{group}={value}' is no setting: they are written key=value")
    if is_config_group(group) and "_target_" in value and not group.startswith("+"):
        raise UsageError(
            f"{group}={value} chooses no option: a component without a file of its own is added "
            f"under a name, as in '+{group}.mine._target_=mypackage.module.Class'"
            if group in NAMED_COMPONENT_GROUPS
            else f"{group}={value} chooses no option: give {group}._target_=mypackage.module.Class"
        )
    if not is_config_group(group) or not value:
        return
    if not all(map(_is_option_name, list_chosen_options(f"{group}={value}"))):
        options = ", ".join(list_group_options(group))
        key = {"guidance": "guidance.scale", "optimizer": "optimizer.lr"}.get(group)
        numbers = key and None not in map(parse_number, value.split(","))
        meant = f"{key}={value} sets the number, and " if numbers else ""
        hint = OWN_DATA_HINT if group == "data" else ""
        raise UsageError(
            f"{group}={value} is no option of {group}: {meant}there are: {options}{hint}"
        )


def _is_option_name(value: object) -> bool:
    """Whether a value may name an option: no null or number, and no path to another group."""
    return isinstance(value, str) and not {"..", ""} & set(value.split("/"))


def explain_hydra_error(error: Exception, config_name: str) -> str:
    """An error of Hydra in plain words, with the nearest setting or option."""
    message = str(error)
    if isinstance(error, MissingConfigException) and (
        found := re.search(r"Could not (?:find|load) '([^']+)'", message)
    ):
        group, _, option = found[1].partition("/")
        if group == "hydra":  # whose groups are hydra/launcher and the like
            group, _, option = found[1].rpartition("/")
        with isolate_hydra():
            options = GlobalHydra.instance().config_loader().get_group_options(group)
        near = suggest_nearest(option, options) or "."
        hint = OWN_DATA_HINT if group == "data" and near == "." else ""
        if (package := SWEEP_PACKAGES.get(option)) is not None:
            typed = option.removeprefix("submitit_")  # the launcher whose settings slurm takes
            return f"{group}={typed} needs a package: pip install {package}"
        return f"{group}={option} does not exist{near} There are: {', '.join(options)}{hint}"
    if found := re.search(r"Could not (?:override|append to config\.?) '?([\w@/.:-]+)'?", message):
        key = found[1].rstrip(".")
        return format_unknown_setting(key, config_name)
    if found := re.search(r"Missing mandatory value: (\S+)", message):
        return f"{found[1]} is needed: give {found[1]}=..."
    if isinstance(error, OverrideParseException):
        if "=" not in error.override:
            word = error.override
            has_ckpt = Path(word).exists() and "ckpt" in list_known_keys(config_name)
            remedy = f"give ckpt={word}" if has_ckpt else "--help lists them"
            return f"'{word}' is no setting: they are written key=value; {remedy}"
        key, _, value = escape_control_characters(error.override).partition("=")
        return (
            f"cannot read {key}={value}: what has blanks or special characters stands in quotes "
            f"twice, for the shell and for Hydra, as in \"{key}='a, b=c'\""
        )
    if found := re.match(r"Ambiguous value for argument '(.*?)=(.*?)'\n1\. ", message, re.DOTALL):
        return format_single_value_error(found[1], found[2], config_name)
    if message.startswith("Error merging override "):
        word, why = message.removeprefix("Error merging override "), f"{error.__cause__}"
        return f"{word} does not fit: {why.splitlines()[0]}"
    return message


def explain_composition_error(
    error: Exception, config_name: str, words: Sequence[str]
) -> str | None:
    """An error of a library while it composes the settings, in plain words; None for others."""
    if isinstance(error, YAMLError):
        return f"an option's file is no YAML: {' '.join(str(error).split())}"
    if isinstance(error, UnicodeDecodeError):
        for path in (path for each in list_config_directories() for path in each.glob("**/*.yaml")):
            with suppress(OSError):
                if error.object.startswith(path.read_bytes()[:512]):
                    return f"{path} is no UTF-8: save it so"
    if str(error).startswith("invalid literal for int()"):
        default = OmegaConf.create(compose_default_config(config_name, words))
        for word in words:
            key = word.lstrip("+~").partition("=")[0].rpartition(".")[0]
            if key and OmegaConf.is_list(OmegaConf.select(default, key)):
                return f"{word}: {key} is a list: give {key}=[...]"
    return None


def check_setting_keys(words: Iterable[str], config_name: str) -> None:
    """UsageError for a setting that no chosen option has: Hydra would compose twice to find it.

    Words that change which settings there are, and Hydra's own settings, are left to Hydra.
    """
    pairs = [word.partition("=") for word in words]
    flags = {key for key, _, _ in pairs if key[:1] in ("+", "~", "-")}
    options = [(key, value) for key, _, value in pairs if is_config_group(key)]
    swept = [(key, value) for key, value in options if "," in value and value[0] != "["]
    if flags - {"--config-dir", "-m", "--multirun"} or (swept and flags <= {"--config-dir"}):
        return
    options = ["=".join(option) for option in options if option not in swept]
    default = compose_default_config(config_name, options)
    for key, equals, _ in pairs:
        node: object = default
        is_ours = re.fullmatch(r"[\w.]+", key) and key.partition(".")[0] != "hydra"
        for part in key.split(".") if equals and is_ours and not is_config_group(key) else ():
            if isinstance(node, dict) and part not in node:
                raise UsageError(format_unknown_setting(key, config_name))
            node = node[part] if isinstance(node, dict) else None


def format_single_value_error(key: str, values: str, config_name: str) -> str:
    """The message for several values of a setting that takes one."""
    list_ = f"a list stands in brackets, '{key}=[{values}]'"
    text = f"a text with a comma in quotes twice, \"{key}='{values}'\""
    runs = (
        f"; `{format_program('train')} -m {key}={values}` makes a run of each"
        if config_name == "train"
        else ""
    )
    return f"{key}={values}: it takes one value here; {list_}, {text}{runs}"


def format_unknown_setting(key: str, config_name: str) -> str:
    """The message for an unknown setting, with the nearest one of any option."""
    key = key.rpartition("@")[2]  # group@place, an option somewhere else
    near = suggest_nearest(key, list_known_keys(config_name, key))
    group, _, leaf = key.partition(".")
    typed = dict(word.partition("=")[::2] for word in sys.argv[1:])
    if target := typed.get(f"{group}._target_"):
        return (
            f"there is no setting '{key}' of the chosen option: one that {target} takes is added, "
            f"+{key}=..."
        )
    others: dict[str, list[str]] = {}  # of the options that were not chosen
    for option, path in list_group_options(group).items() if leaf else ():
        settings = OmegaConf.load(path)
        nested = group in NAMED_COMPONENT_GROUPS
        names = _keys(OmegaConf.to_container(settings)) if nested else _option_keys(settings)
        for name in _find_closest(leaf, list(names)):
            others.setdefault(f"{group}.{name}", []).append(option)
    same = [name for name in others if _split_name(name) == _split_name(key)]
    if same:
        others = {name: others[name] for name in same}
    elif f" {group}." in near or near.endswith(f".{leaf}?"):
        others = {}
    if not others:
        return f"there is no setting '{key}'{near}"
    known = "; ".join(f"{name} of {', '.join(options)}" for name, options in others.items())
    option = next(iter(others.values()))[0]
    if group in NAMED_COMPONENT_GROUPS and typed.get(group, "") not in ("", "none", "csv"):
        option = f"'[{typed[group].strip('[]')},{option}]'"  # next to those that are chosen
    return f"there is no setting '{key}' here, but there is {known}: add {group}={option}"


def _find_closest(word: str, known: Iterable[str]) -> list[str]:
    """The nearest of `known`, if one is near."""
    same = [each for each in known if _split_name(each) == _split_name(word)]
    return same or difflib.get_close_matches(word, known, n=1)


def _split_name(name: str) -> list[str]:
    """The words of a name, sorted: scale_style is style_scale."""
    return sorted(re.split(r"[._]", name))


def _option_keys(option: DictConfig) -> list[str]:
    """The settings of an option, with those that are options themselves."""
    chosen = [place for entry in option.get("defaults", ()) if entry != "_self_" for place in entry]
    return [*option, *(place.rpartition("@")[2] for place in chosen if "@" in place)]


def list_known_keys(config_name: str, wanted: str = "") -> list[str]:
    """Every key and group with the options of the command line; Hydra's for `hydra.*`."""
    if not wanted.startswith("hydra."):
        try:
            return [*_keys(compose_default_config(config_name, sys.argv[1:]))]
        except HydraException:  # several values, of a sweep
            return [*_keys(compose_default_config(config_name, []))]
    options = [word for word in sys.argv[1:] if word.startswith("hydra/")]
    with isolate_hydra():
        cfg = compose(config_name, overrides=options, return_hydra_config=True)
    return [*_keys(OmegaConf.to_container(cfg.hydra), "hydra.")]


def _keys(settings: Mapping, prefix: str = "") -> Iterator[str]:
    for key, value in settings.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")


# Settings of hydra-optuna-sweeper that follow from the run's own.
OPTUNA_DEFAULTS = {
    "optuna": {
        "direction": "${direction}",
        "n_jobs": "${oc.select:hydra.launcher.n_jobs,1}",  # trials at once
        "max_failure_rate": 1.0,  # a failed trial is recorded, and the search goes on
        "study_name": "${name}",
    },
    "sampler/tpe": {"seed": "${seed}", "n_startup_trials": 5},
}


def set_optuna_defaults() -> None:
    """Sets the defaults of hydra/sweeper=optuna in Hydra's store, which refuses a YAML file."""
    Plugins.instance()  # finds the plugins, which then store their settings
    logging.getLogger("alembic").setLevel(logging.WARNING)  # of optuna, about itself
    store = ConfigStore.instance()
    for path, ours in OPTUNA_DEFAULTS.items():
        group, _, name = f"hydra/sweeper/{path}".rpartition("/")
        try:
            is_stored = f"{name}.yaml" in store.list(group)
        except OSError:  # so Hydra says that nothing is stored in this group
            is_stored = False
        if is_stored:
            node = store.load(f"{group}/{name}.yaml").node
            node.update(ours)
            store.store(group=group, name=name, node=node, provider="ldm")


def suggest_overrides(cfg: DictConfig, group: str) -> list[str]:
    """The command-line words that give a configuration's group: the nearest option and changes."""
    have, found = OmegaConf.to_container(cfg[group]), []
    for name, path in list_group_options(group).items():
        option = OmegaConf.load(path)
        other = {key: value for key, value in have.items() if option.get(key, ...) != value}
        words = {k: v if isinstance(v, str) else json.dumps(v) for k, v in other.items()}
        added = {key: "" if key in option else "+" for key in words}
        words = [f"{added[key]}{group}.{key}={value}" for key, value in words.items()]
        found.append([f"{group}={name}", *words])
    return min(found, key=len)
