"""Components from a package of the user's own: what is known of them before anything is built."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec

from ldm.config.composition import compose_default_config, list_option_words
from ldm.config.ranges import OWN_TARGET_PREFIXES
from ldm.config.reserved_settings import NAMED_COMPONENT_GROUPS
from ldm.config.search_path import is_config_group, list_config_directories
from ldm.utils.errors import UsageError, suggest_nearest

# The groups of the components of a model.
DIFFUSION_GROUPS = ("autoencoder", "text_encoder", "model", "scheduler", "objective", "task")
# Groups that older files lack.
OPTIONAL_GROUPS = ("style_encoder", "weighting", "loss", "timestep_sampler")
CLASSIFIER_GROUPS = ("text_encoder", "scheduler", "classifier")
COMPONENT_GROUPS = tuple(dict.fromkeys((*DIFFUSION_GROUPS, *OPTIONAL_GROUPS, *CLASSIFIER_GROUPS)))
# Components within others that are options of a group; in older checkpoints.
NESTED_GROUPS = {
    "objective.weighting": "weighting",
    "objective.timestep_sampler": "timestep_sampler",
}
# The class whose public methods a component of a group has.
INTERFACES = {
    "scheduler": "ldm.diffusion.schedules.Schedule",
    "objective": "ldm.diffusion.objective.Objective",
    "objective.prediction": "ldm.diffusion.predictions.Prediction",
    "weighting": "collections.abc.Callable",
    "loss": "collections.abc.Callable",
    "timestep_sampler": "collections.abc.Callable",
    "sampler": "ldm.diffusion.samplers.base.Sampler",
    "guidance": "ldm.diffusion.guidance.base.Guidance",
    "task": "ldm.diffusion.tasks.base.Task",
    "model": "ldm.models.base.Denoiser",
    "autoencoder": "ldm.models.autoencoder.IdentityAutoencoder",
    "text_encoder": "ldm.models.base.TextEncoder",
    "features": "ldm.evaluation.features.base.FeatureExtractor",
    "optimizer": "collections.abc.Callable",
    "metrics": "ldm.evaluation.image_metrics.ImageMetric",
}
# Arguments that no YAML has, of each component of these groups, and of some.
PASSED_ARGUMENTS = {
    "model": ("in_channels", "out_channels", "context_dim", "pooled_dim"),
    "objective": ("schedule", "weighting", "loss", "timestep_sampler"),
    "timestep_sampler": ("batch",),
    "data": ("seed",),
    "eval": ("pipeline", "data", "folder"),
}
SOMETIMES_PASSED = {
    "model": ("temporal", "style_dim", "style_code"),
    "guidance": ("schedule", "x0_at_zero_output"),
    "logger": ("run_dir", "name", "overrides"),
}

# Empty settings of our options: an option of a user that builds on one passes them to its class.
LATER_SETTINGS = {"model": ("checkpointing",)}

BARE_INIT_MODULES = ("typing", "torch.nn.modules.module")
OPEN_ENDED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def check_own_component(node: Mapping, place: str, default: Mapping) -> None:
    """UsageError unless the target of a node is a component of its group that takes its settings.

    place: the key of the node. default: the settings of the chosen option.
    """
    target, group = str(node["_target_"]), find_component_group(place)
    found = import_component(target, place)
    if group in INTERFACES and inspect.isclass(found):
        interface = INTERFACES[group]
        if missing := list_missing_methods(found, import_component(interface, group)):
            raise UsageError(f"{place}={target} has no {', '.join(missing)}, as {interface} has")
    passed = PASSED_ARGUMENTS.get(group, ())
    for name in passed:
        if not takes_argument(found, name):
            raise UsageError(f"{place}={target} takes no {name}, which every {group} gets")
    check_setting_names([*node], place, target, default)
    known = {*node, *passed, *SOMETIMES_PASSED.get(group, ())}
    missing = [
        each.name
        for each in list_parameters(found)
        if each.default is each.empty and each.kind not in OPEN_ENDED and each.name not in known
    ]
    if missing and not {"_partial_", "_args_"} & node.keys():
        key = f"{place}.{missing[0]}"
        raise UsageError(f"{key} is needed by {target}: give +{key}=...")


def check_setting_names(keys: Sequence[str], place: str, target: str, default: Mapping) -> None:
    """UsageError for the first of these settings of a node that its target does not take."""
    found = import_component(target, place)
    wrong = [key for key in keys if not key.startswith("_") and not takes_argument(found, key)]
    if not wrong:
        return
    if wrong[0] in default and default.get("_target_") != target:  # of a class that was replaced
        others = [key for key in wrong if key in default]
        words = " ".join(write_deletions(f"{place}.{key}" for key in others))
        raise UsageError(f"{target} takes no {', '.join(others)}: leave them out with {words}")
    passed = PASSED_ARGUMENTS.get(find_component_group(place), ())
    own = [each.name for each in list_parameters(found) if each.name not in passed]
    near = suggest_nearest(wrong[0], own) or f". It takes {', '.join(own[:12]) or 'no settings'}"
    raise UsageError(f"{place}.{wrong[0]}: {target} takes no '{wrong[0]}'{near}")


def list_parameters(found: Callable) -> list[inspect.Parameter]:
    """The arguments of a class or function; any, where they are not known."""
    init = getattr(found, "__init__", None)
    # A class without one inherits a constructor that takes anything, and then refuses it.
    if inspect.isclass(found) and getattr(init, "__module__", "") in BARE_INIT_MODULES:
        return []
    try:
        return list(inspect.signature(found).parameters.values())
    except (ValueError, TypeError):  # some in C have no signature
        return [inspect.Parameter("more", inspect.Parameter.VAR_KEYWORD)]


def takes_argument(found: Callable, name: str) -> bool:
    """Whether a class or function takes an argument by this name."""
    return any(
        each.name == name or each.kind is each.VAR_KEYWORD for each in list_parameters(found)
    )


def list_replaced_settings(words: Sequence[str], config_name: str) -> dict[str, list[str]]:
    """The settings of a group that `group._target_=mypackage.Class` leaves without a reader.

    Of an option's own class: the `LATER_SETTINGS` that it inherits and does not take.
    """
    typed = {word.lstrip("+~").partition("=")[0]: word.partition("=")[2] for word in words}
    targets = {key.removesuffix("._target_"): typed[key] for key in typed if "._target_" in key}
    targets = {
        group: target
        for group, target in targets.items()
        if is_config_group(group) and not target.startswith(OWN_TARGET_PREFIXES)
    }
    options = list_option_words(words)
    if not targets and len(list_config_directories()) == 1:  # nothing here is a user's own
        return {}
    if any("," in word for word in (*targets.values(), *options)):
        return {}
    default, replaced = compose_default_config(config_name, options), {}
    for group, later in LATER_SETTINGS.items():
        node = default.get(group) or {}
        own = str(node.get("_target_", OWN_TARGET_PREFIXES[0]))
        empty = [key for key in later if key in node and not node[key]]
        if empty and group not in targets and not own.startswith(OWN_TARGET_PREFIXES):
            found = import_component(own, group)
            keys = [f"{group}.{key}" for key in empty if not takes_argument(found, key)]
            replaced[own] = [key for key in keys if key not in typed]
    for group, target in targets.items():
        found = import_component(target, group)
        names = {each.name for each in list_parameters(found)}
        keys = [key for key in default.get(group) or () if key[0] != "_" and key not in names]
        replaced[target] = [key for key in (f"{group}.{key}" for key in keys) if key not in typed]
    return {target: keys for target, keys in replaced.items() if keys}


def write_deletions(keys: Iterable[str]) -> list[str]:
    """The words that delete settings: Hydra's ~ refuses one that is null, so each gets a value."""
    return [word for key in keys for word in (f"{key}=0", f"~{key}")]


def find_component_group(place: str) -> str:
    """The group of the component at a key, such as guidance for guidance.inner."""
    place = NESTED_GROUPS.get(place, place)
    group = place.partition(".")[0]
    return group if group in (*NAMED_COMPONENT_GROUPS, "guidance") else place


def list_missing_methods(found: type, interface: type) -> list[str]:
    """The public methods of an interface that a class lacks, or has as abstract ones."""
    have = {name for base in found.__mro__ for name in vars(base)}
    have -= getattr(found, "__abstractmethods__", frozenset())
    return [
        name
        for name, value in vars(interface).items()
        if callable(value) and name not in have and (name == "__call__" or name[0] != "_")
    ]


def import_component(target: str, place: str) -> Callable:
    """The class or function that a target names; UsageError with the reason where there is none."""
    what = f"{place}._target_={target}"
    module, _, name = target.rpartition(".")
    if not all(part.isidentifier() for part in (*module.split("."), name)):
        raise UsageError(f"{what} is no name of a class: give mypackage.module.Class")
    if find_spec(target.partition(".")[0]) is None:
        raise UsageError(
            f"{what}: No module named '{target.partition('.')[0]}'. If it is yours, install it, or "
            "give PYTHONPATH=FOLDER, where it lies"
        )
    import pydoc  # slow, and needed only for classes that are not ours

    try:
        found = pydoc.locate(target)
        near = difflib.get_close_matches(name, dir(pydoc.locate(module)), n=1)
    except pydoc.ErrorDuringImport as error:
        raise UsageError(f"{what}: {str(error).splitlines()[0]}") from error
    if not callable(found):
        hint = f" - did you mean {near[0]}?" if near else ""
        raise UsageError(f"{what}: there is no such class or function{hint}")
    return found
