"""The components that a configuration from a file may build: those of conf/, and nothing else.

Checkpoints and run directories may come from anyone, and a `_target_` is a call. Every component of
such a file goes through `validate_component`, which looks at plain values before anything is
imported or called. A user may allow packages of their own by name (`trust=[mypackage]`).
"""

import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path

import yaml
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from ldm.config.own_components import COMPONENT_GROUPS, NESTED_GROUPS, takes_argument
from ldm.config.ranges import format_invalid_value
from ldm.config.search_path import CONF_DIR
from ldm.config.trust import NEVER_TRUSTED
from ldm.data.shards.data_sets import list_data_sets, list_locations
from ldm.experiments.former_names import get_rng, update_names
from ldm.utils.checkpoint_file import CheckpointError
from ldm.utils.plain_yaml import parse_plain_mapping

# Settings of other groups that decide the sizes of components, with their types.
SIZE_SETTINGS = {
    "data": {"size": int, "batch_size": int, "frames": (int, type(None))},
    "trainer": {"precision": (str, int, type(None))},
}
MAX_INTEGER = 10**7  # larger than any size of a component
MAX_LIST_LENGTH = 100_000
PLAIN_TYPES = (str, bool, int, float, type(None))


@cache
def list_component_targets() -> Mapping[str, frozenset[str]]:
    """The targets that conf/ names at each place: a group, or `group.key` for a nested one."""
    found: dict[str, set[str]] = {}
    for path in sorted(Path(CONF_DIR).glob("*/*.yaml")):
        _collect_targets(path.parent.name, yaml.safe_load(path.read_text()) or {}, found)
    return {place: frozenset(targets) for place, targets in found.items()}


def _collect_targets(place: str, option: dict, found: dict[str, set[str]]) -> None:
    targets = found.setdefault(place, set())
    if "_target_" in option:
        targets.add(option["_target_"])
    for key, value in option.items():
        if isinstance(value, dict):
            _collect_targets(f"{place}.{key}", value, found)


def validate_file_config(
    text: object, where: Path, *, needed: tuple[str, ...], trust: Sequence[str] | None = None
) -> DictConfig:
    """The component groups of a file's configuration, with the names of today.

    needed: the groups that must be there. `data`, `trainer` and `rng` come along as plain values,
    all else is left out. trust: the packages whose components are allowed, too; None: the command
    has no such setting. Raises CheckpointError, which names `where` and what is wrong.
    """
    try:
        config = update_names(parse_plain_mapping(text))
        for group in needed:
            if not config.get(group):
                raise ValueError(f"it says nothing of {group}")
        present = [name for name in COMPONENT_GROUPS if config.get(name)]
        valid = {name: validate_component(config[name], name, trust=trust) for name in present}
        for group, kinds in SIZE_SETTINGS.items():
            valid[group] = _validate_sizes(config.get(group), group, kinds)
        valid["rng"] = get_rng(config)
        if message := format_invalid_value("rng", valid["rng"], "train"):
            raise ValueError(message)
    except ValueError as error:
        raise CheckpointError(f"{where} is not used, and nothing of it was run: {error}") from error
    return OmegaConf.create(valid)


def validate_component(node: object, place: str, *, trust: Sequence[str] | None = None) -> dict:
    """A component of a file's configuration as plain values.

    Raises ValueError unless its target is one that conf/ names at `place` or one of a trusted
    package, and its arguments are plain values, or components of conf/, that the target takes.
    """
    if not isinstance(node, dict):
        raise ValueError(f"{place} is {_shorten_repr(node)}, and no component")
    place = NESTED_GROUPS.get(place, place)
    target = node.get("_target_")
    if not isinstance(target, str):
        raise ValueError(f"{place} asks to call {_shorten_repr(target)}, which is no name of ours")
    ours = target in list_component_targets().get(place, ())
    if not ours:
        check_trusted_target(target, place, trust)
    component = get_object(target)
    valid: dict[str, object] = {"_target_": target}
    for key, value in node.items():
        if key == "_target_":
            continue
        if key.startswith("_") or not takes_argument(component, key):
            key = _shorten_repr(key)
            raise ValueError(f"{place} has the key {key}, which {target} does not take")
        inner = f"{place}.{key}"
        if NESTED_GROUPS.get(inner, inner) in list_component_targets():
            valid[key] = validate_component(value, inner, trust=trust)
        elif ours and (_has_numbers_by_name(value) or _has_data_sets(value)):
            valid[key] = value
        elif ours:
            if isinstance(value, dict):
                raise ValueError(f"{inner} is a component, where none can be")
            valid[key] = validate_plain_value(value, inner)
            message = format_invalid_value(inner, value, "train")
            if value is not None and message:
                raise ValueError(message)
        else:
            valid[key] = _validate_own_setting(value, inner, trust)
    return valid


def _validate_own_setting(value: object, name: str, trust: Sequence[str] | None) -> object:
    """A setting of a trusted class, which may hold mappings, and components of its package."""
    if isinstance(value, dict) and "_target_" in value:
        return validate_component(value, name, trust=trust)
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str) or key.startswith("_"):
                raise ValueError(f"{name} has the key {_shorten_repr(key)}")
        return {key: _validate_own_setting(each, name, trust) for key, each in value.items()}
    if isinstance(value, list) and len(value) <= MAX_LIST_LENGTH:
        return [_validate_own_setting(each, name, trust) for each in value]
    if message := format_invalid_value(name, value, "train", ours=False):
        raise ValueError(message)
    return validate_plain_value(value, name)


def _has_numbers_by_name(value: object) -> bool:
    """Returns whether a value is a mapping of numbers, such as data.captions."""
    is_mapping = isinstance(value, dict) and bool(value)
    return is_mapping and all(type(each) in (int, float) for each in value.values())


def _has_data_sets(value: object) -> bool:
    """Returns whether a value lists data sets, such as data.train, in plain values."""
    if not isinstance(value, list | dict) or len(value) > MAX_LIST_LENGTH:
        return False
    try:
        validate_plain_value(list_locations(value), "path")
        return bool(list_data_sets(value))
    except ValueError:
        return False


def check_trusted_target(target: str, place: str, trust: Sequence[str] | None) -> None:
    """Imports a target of the user's own, where `trust` names its package; else ValueError.

    Raises ValueError as well for anything but a class or function that is defined in the package.
    """
    refusal = f"it asks to call {_shorten_repr(target)}, which is no {place} of ours"
    package = target.partition(".")[0]
    if trust is None or not package.isidentifier() or "." not in target:
        raise ValueError(refusal)
    if package in NEVER_TRUSTED:
        more = "" if package == "ldm" else f", and {package} is no package of your own"
        raise ValueError(f"{refusal}{more}")
    if package not in trust:
        raise ValueError(f"{refusal}: add trust=[{package}] if you trust that package")
    module, _, name = target.rpartition(".")
    try:  # a module of the package, and its name: attributes of others may import or run code
        found = getattr(import_module(module), name, None)
        # instantiate finds another object where a name of the package hides the module.
        is_own = is_defined_in(found, package) and get_object(target) is found
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else ""
        if missing == package:
            remedy = f"install {package}, or give PYTHONPATH=FOLDER, where it lies"
            raise ValueError(f"{refusal}, and there is no module '{package}': {remedy}") from None
        if not missing or not f"{module}.".startswith(f"{missing}."):  # of the user's own code
            error = _shorten_repr(error)
            raise ValueError(f"{refusal}; {package} was trusted, and fails: {error}") from None
        is_own = False
    if not is_own:
        raise ValueError(f"{refusal}, and no class or function that {package} defines")


def is_defined_in(found: object, package: str) -> bool:
    """Whether an object is a class or function at the top level of one of a package's modules."""
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        return False
    return found.__module__.partition(".")[0] == package and "." not in found.__qualname__


def validate_plain_value(value: object, name: str) -> object:
    """A value without calls and interpolations, or a list of such values; else ValueError."""
    if isinstance(value, list):
        if len(value) > MAX_LIST_LENGTH:
            raise ValueError(f"{name} has {len(value)} entries")
        return [validate_plain_value(each, name) for each in value]
    if not isinstance(value, PLAIN_TYPES):
        raise ValueError(f"{name} has {_shorten_repr(value)} in it, which is no plain value")
    if isinstance(value, str) and ("${" in value or value == "???"):
        raise ValueError(f"{name} is {_shorten_repr(value)}, which is to be looked up elsewhere")
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise ValueError(f"{name} is {_shorten_repr(value)}, beyond all sizes")
    return value


def _validate_sizes(node: object, group: str, kinds: dict[str, type | tuple[type, ...]]) -> dict:
    if not isinstance(node, dict):
        raise ValueError(f"{group} is {_shorten_repr(node)}, and no mapping")
    for key, kind in kinds.items():
        value, name = node.get(key), f"{group}.{key}"
        right = isinstance(value, kind) and not isinstance(value, bool)
        if not right or (isinstance(value, int) and not 0 < value <= MAX_INTEGER):
            raise ValueError(f"{name} is {_shorten_repr(value)}")
        if isinstance(value, int) and (message := format_invalid_value(name, value, "train")):
            raise ValueError(message)
    # A target of the user's own may take anything here: it is not built.
    return {key: value for key, value in node.items() if _is_plain(value, f"{group}.{key}")}


def _is_plain(value: object, name: str) -> bool:
    if _has_data_sets(value):
        return True
    try:
        validate_plain_value(value, name)
    except ValueError:
        return False
    return True


def _shorten_repr(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
