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

from ldm.config.command_line import CONF
from ldm.config.ranges import flaw
from ldm.utils.checkpoint_file import CheckpointError
from ldm.utils.plain_yaml import read_mapping

# Groups that a model is built of.
MODEL = ("autoencoder", "text_encoder", "model", "scheduler", "objective", "task")
MAYBE = ("style_encoder", "weighting", "loss", "time_sampler")  # not in older checkpoints
CLASSIFIER = ("text_encoder", "scheduler", "classifier")
GROUPS = tuple(dict.fromkeys((*MODEL, *MAYBE, *CLASSIFIER)))

# Where components had other names, the names of today; old checkpoints say the old ones.
FORMER_NAMES = {
    "ldm.diffusion.objective.PowerTimes": "ldm.diffusion.timesteps.PowerTimes",
    "ldm.diffusion.objective.UniformWeighting": "ldm.diffusion.weightings.UniformWeighting",
}
# Components within others that are options of a group.
WITHIN = {
    "objective.weighting": "weighting",  # in checkpoints of before these were groups
    "objective.time_sampler": "time_sampler",
}
# Values of other groups that the parts of a model are built with, and of which type they are.
SIZES = {
    "data": {"size": int, "batch_size": int, "frames": (int, type(None))},
    "trainer": {"precision": (str, int, type(None))},
}
LARGEST = 10**7  # of an integer: no size of a component comes near
LONGEST = 100_000  # entries of a list
PLAIN = (str, bool, int, float, type(None))


@cache
def components() -> Mapping[str, frozenset[str]]:
    """The targets that conf/ names at each place: a group, or `group.key` for a nested one."""
    found: dict[str, set[str]] = {}
    for path in sorted(Path(CONF).glob("*/*.yaml")):
        _collect(path.parent.name, yaml.safe_load(path.read_text()) or {}, found)
    return {place: frozenset(targets) for place, targets in found.items()}


def _collect(place: str, option: dict, found: dict[str, set[str]]) -> None:
    targets = found.setdefault(place, set())
    if "_target_" in option:
        targets.add(option["_target_"])
    for key, value in option.items():
        if isinstance(value, dict):
            _collect(f"{place}.{key}", value, found)


def admit(text: object, where: Path, *, needed: tuple[str, ...]) -> DictConfig:
    """The groups of a file's configuration that models are built of, with today's names.

    needed: those that must be there. `data` and `trainer` come along as plain values; what else
    the file says is left out. Raises CheckpointError, which names `where` and what is wrong.
    """
    try:
        config = read_mapping(text)
        for group in needed:
            if not config.get(group):
                raise ValueError(f"it says nothing of {group}")
        there = [name for name in GROUPS if config.get(name)]
        admitted = {name: admit_component(config[name], name) for name in there}
        for group, kinds in SIZES.items():
            admitted[group] = _sizes(config.get(group), group, kinds)
    except ValueError as error:
        raise CheckpointError(f"{where} is not used, and nothing of it was run: {error}") from error
    return OmegaConf.create(admitted)


def admit_component(node: object, place: str) -> dict:
    """A component of a file's configuration, plain, its target one that conf/ names at `place`.

    Raises ValueError for other targets, and for arguments that are no plain values, no components
    of conf/ or not the target's own.
    """
    if not isinstance(node, dict):
        raise ValueError(f"{place} is {_short(node)}, and no component")
    place = WITHIN.get(place, place)
    target = node.get("_target_")
    if not isinstance(target, str):
        raise ValueError(f"{place} asks to call {_short(target)}, which is no name of ours")
    target = FORMER_NAMES.get(target, target)
    if target not in components().get(place, ()):
        raise ValueError(f"it asks to call {_short(target)}, which is no {place} of ours")
    takes = arguments(target)
    admitted: dict[str, object] = {"_target_": target}
    for key, value in node.items():
        if key == "_target_":
            continue
        if key not in takes:
            raise ValueError(f"{place} has the key {_short(key)}, which {target} does not take")
        inner = f"{place}.{key}"
        if WITHIN.get(inner, inner) in components():
            admitted[key] = admit_component(value, inner)
        elif isinstance(value, dict):
            raise ValueError(f"{inner} is a component, where none can be")
        else:
            admitted[key] = plain(value, inner)
            if value is not None and (said := flaw(inner, value, "train")):
                raise ValueError(said)
    return admitted


def plain(value: object, name: str) -> object:
    """A value that is no call and no interpolation, lists of such among them; else ValueError."""
    if isinstance(value, list):
        if len(value) > LONGEST:
            raise ValueError(f"{name} has {len(value)} entries")
        return [plain(each, name) for each in value]
    if not isinstance(value, PLAIN):
        raise ValueError(f"{name} has {_short(value)} in it, which is no plain value")
    if isinstance(value, str) and ("${" in value or value == "???"):
        raise ValueError(f"{name} is {_short(value)}, which is to be looked up elsewhere")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"{name} is {_short(value)}, beyond all sizes")
    return value


def arguments(target: str) -> frozenset[str]:
    """The names of a target's own arguments."""
    parameters = inspect.signature(get_object(target)).parameters.values()
    open_ended = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return frozenset(one.name for one in parameters if one.kind not in open_ended)


def _sizes(node: object, group: str, kinds: dict[str, object]) -> dict:
    if not isinstance(node, dict):
        raise ValueError(f"{group} is {_short(node)}, and no mapping")
    for key, kind in kinds.items():
        value = node.get(key)
        right = isinstance(value, kind) and not isinstance(value, bool)
        if not right or (isinstance(value, int) and not 0 < value <= LARGEST):
            raise ValueError(f"{group}.{key} is {_short(value)}")
        if isinstance(value, int) and (said := flaw(f"{group}.{key}", value, "train")):
            raise ValueError(said)
    # What a target of the user's own takes is no affair of ours: it is not built.
    return {key: value for key, value in node.items() if _is_plain(value, f"{group}.{key}")}


def _is_plain(value: object, name: str) -> bool:
    try:
        plain(value, name)
    except ValueError:
        return False
    return True


def _short(value: object) -> str:
    """A value for messages, on one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
