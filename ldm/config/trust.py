"""The packages of a user's own that a file may name components of."""

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ldm.config.own_components import COMPONENT_GROUPS
from ldm.config.ranges import OWN_TARGET_PREFIXES
from ldm.utils.errors import UsageError
from ldm.utils.files import read_text
from ldm.utils.plain_yaml import parse_plain_mapping, parse_plain_yaml

MAX_USER_CONFIG_BYTES = 2**16
# No packages of a user's own: some of their functions delete files or run them. Of ldm, only the
# targets of conf/ may be built.
NEVER_TRUSTED = sys.stdlib_module_names | {
    *("ldm", "hydra_plugins", "__main__", "torch", "lightning"),
    *("pytorch_lightning", "torchmetrics"),
    *("lightning_fabric", "lightning_utilities", "hydra", "omegaconf", "wandb", "transformers"),
    *("diffusers", "accelerate", "huggingface_hub", "webdataset", "safetensors", "tokenizers"),
    *("numpy", "scipy", "PIL", "matplotlib", "torchvision", "yaml", "fsspec", "optuna", "submitit"),
    *("cloudpickle", "joblib", "setuptools", "pkg_resources", "pip", "_pytest", "pytest", "tqdm"),
}


def list_trusted_packages(cfg: DictConfig) -> tuple[str, ...]:
    """The packages that the setting `trust` names, and those of the user's configuration file."""
    trust = OmegaConf.to_container(OmegaConf.create({"trust": cfg.get("trust")}))["trust"]
    return tuple(dict.fromkeys([*parse_package_names(trust), *read_user_trust()]))


def read_user_trust() -> list[str]:
    """The packages of the line `trust: [mypackage]` in the user's configuration file."""
    path = find_user_config_file()
    if not os.path.lexists(path):  # a folder that cannot be read is none
        return []
    try:
        text = read_text(path, max_bytes=MAX_USER_CONFIG_BYTES)
        settings = {} if parse_plain_yaml(text) is None else parse_plain_mapping(text)
        if others := settings.keys() - {"trust"}:
            raise ValueError(f"it has the key '{min(others)}', where `trust` alone is read")
        return parse_package_names(settings.get("trust"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}. It holds one line, trust: [mypackage]") from error


def find_user_config_file() -> Path:
    """~/.config/ldm/config.yaml, or where XDG_CONFIG_HOME says."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config", "ldm/config.yaml").expanduser()


def parse_package_names(trust: object) -> list[str]:
    """The packages of a value of `trust`: a list, one name, or nothing; UsageError for others."""
    names = trust if isinstance(trust, list) else [trust] if trust is not None else []
    for name in names:
        if not isinstance(name, str) or not name.isidentifier():
            whole = str(name).partition(".")[0]
            example = whole if whole.isidentifier() and isinstance(name, str) else "mypackage"
            raise UsageError(f"trust={name} is no name of a package: give trust=[{example}]")
        if name in NEVER_TRUSTED:
            raise UsageError(f"trust=[{name}]: {name} is no package of your own, leave it out")
    return names


def check_own_packages(settings: Mapping) -> list[str]:
    """The packages that a training takes components from, which commands must trust later.

    Raises UsageError for a component that no command could build from the run's files.
    """
    groups = {
        group: targets
        for group in COMPONENT_GROUPS
        if (targets := list(_iterate_own_targets(settings.get(group))))
    }
    packages = {target.partition(".")[0] for targets in groups.values() for target in targets}
    for group in groups:
        from ldm.config.registry import validate_component  # torch, which these import anyway

        try:
            validate_component(settings[group], group, trust=sorted(packages))
        except ValueError as error:
            raise UsageError(
                f"no command could read a run with this {group}, because {error}. Wrap it in a "
                "class or function of a package of your own"
            ) from error
    return sorted(packages)


def _iterate_own_targets(node: object) -> Iterator[str]:
    """The targets in a setting that are not of ours."""
    values = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for value in values:
        yield from _iterate_own_targets(value)
    target = node.get("_target_") if isinstance(node, dict) else None
    if isinstance(target, str) and not target.startswith(OWN_TARGET_PREFIXES):
        yield target
