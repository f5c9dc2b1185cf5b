"""What a configuration from a file may build: the components of conf/, and nothing else.

Checkpoints and run directories may come from anyone, and a `_target_` is a call. All that is built
of them goes through `admit`, which looks at plain values before anything is imported or called.
"""

import inspect
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import yaml
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from ldm.config.ranges import format_invalid_value
from ldm.config.suggestions import CONF_DIR
from ldm.experiments.former_names import update_names
from ldm.utils.checkpoint_file import CheckpointError
from ldm.utils.plain_yaml import parse_plain_mapping

# Groups that a model is built of.
DIFFUSION_GROUPS = ("autoencoder", "text_encoder", "model", "scheduler", "objective", "task")
OPTIONAL_GROUPS = (
    "style_encoder",
    "weighting",
    "loss",
    "timestep_sampler",
)  # not in older checkpoints
CLASSIFIER_GROUPS = ("text_encoder", "scheduler", "classifier")
COMPONENT_GROUPS = tuple(dict.fromkeys((*DIFFUSION_GROUPS, *OPTIONAL_GROUPS, *CLASSIFIER_GROUPS)))

# Components within others that are options of a group.
NESTED_GROUPS = {
    "objective.weighting": "weighting",  # in checkpoints of before these were groups
    "objective.timestep_sampler": "timestep_sampler",
}
# Values of other groups that the parts of a model are built with, and of which type they are.
SIZE_SETTINGS = {
    "data": {"size": int, "batch_size": int, "frames": (int, type(None))},
    "trainer": {"precision": (str, int, type(None))},
}
MAX_INTEGER = 10**7  # of an integer: no size of a component comes near
MAX_LIST_LENGTH = 100_000  # entries of a list
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


def validate_file_config(text: object, where: Path, *, needed: tuple[str, ...]) -> DictConfig:
    """The groups of a file's configuration that models are built of, with today's names.

    needed: those that must be there. `data` and `trainer` come along as plain values; what else
    the file says is left out. Raises CheckpointError, which names `where` and what is wrong.
    """
    try:
        config = update_names(parse_plain_mapping(text))
        for group in needed:
            if not config.get(group):
                raise ValueError(f"it says nothing of {group}")
        there = [name for name in COMPONENT_GROUPS if config.get(name)]
        admitted = {name: validate_component(config[name], name) for name in there}
        for group, kinds in SIZE_SETTINGS.items():
            admitted[group] = _validate_sizes(config.get(group), group, kinds)
    except ValueError as error:
        raise CheckpointError(f"{where} is not used, and nothing of it was run: {error}") from error
    return OmegaConf.create(admitted)


def validate_component(node: object, place: str) -> dict:
    """A component of a file's configuration, plain, its target one that conf/ names at `place`.

    Raises ValueError for other targets, and for arguments that are no plain values, no components
    of conf/ or not the target's own.
    """
    if not isinstance(node, dict):
        raise ValueError(f"{place} is {_shorten_repr(node)}, and no component")
    place = NESTED_GROUPS.get(place, place)
    target = node.get("_target_")
    if not isinstance(target, str):
        raise ValueError(f"{place} asks to call {_shorten_repr(target)}, which is no name of ours")
    if target not in list_component_targets().get(place, ()):
        raise ValueError(f"it asks to call {_shorten_repr(target)}, which is no {place} of ours")
    takes = list_target_arguments(target)
    admitted: dict[str, object] = {"_target_": target}
    for key, value in node.items():
        if key == "_target_":
            continue
        if key not in takes:
            raise ValueError(
                f"{place} has the key {_shorten_repr(key)}, which {target} does not take"
            )
        inner = f"{place}.{key}"
        if NESTED_GROUPS.get(inner, inner) in list_component_targets():
            admitted[key] = validate_component(value, inner)
        elif isinstance(value, dict):
            raise ValueError(f"{inner} is a component, where none can be")
        else:
            admitted[key] = validate_plain_value(value, inner)
            if value is not None and (said := format_invalid_value(inner, value, "train")):
                raise ValueError(said)
    return admitted


def validate_plain_value(value: object, name: str) -> object:
    """A value that is no call and no interpolation, lists of such among them; else ValueError."""
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


def list_target_arguments(target: str) -> frozenset[str]:
    """The names of a target's own arguments."""
    parameters = inspect.signature(get_object(target)).parameters.values()
    open_ended = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return frozenset(one.name for one in parameters if one.kind not in open_ended)


def _validate_sizes(node: object, group: str, kinds: dict[str, type | tuple[type, ...]]) -> dict:
    if not isinstance(node, dict):
        raise ValueError(f"{group} is {_shorten_repr(node)}, and no mapping")
    for key, kind in kinds.items():
        value = node.get(key)
        right = isinstance(value, kind) and not isinstance(value, bool)
        if not right or (isinstance(value, int) and not 0 < value <= MAX_INTEGER):
            raise ValueError(f"{group}.{key} is {_shorten_repr(value)}")
        if isinstance(value, int) and (
            said := format_invalid_value(f"{group}.{key}", value, "train")
        ):
            raise ValueError(said)
    # What a target of the user's own takes is no affair of ours: it is not built.
    return {key: value for key, value in node.items() if _is_plain(value, f"{group}.{key}")}


def _is_plain(value: object, name: str) -> bool:
    try:
        validate_plain_value(value, name)
    except ValueError:
        return False
    return True


def _shorten_repr(value: object) -> str:
    """A value for messages, on one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
