"""The directories with options: conf/, then those of the command line and of installed packages.

Hydra reads an option from the first directory that has it. This module imports little: Hydra's
plugin reads it at each start (hydra_plugins/ldm_search_path).
"""

import os
import shlex
import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from ldm.utils.errors import UsageError

PACKAGE = Path(__file__).resolve().parent.parent
# A wheel holds conf/ inside the package; a checkout holds it beside the package.
CONF_DIR = str(next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir()))
ENTRY_POINT_GROUP = "ldm.conf"
CONFIG_DIR_FLAGS = ("--config-dir", "-cd")
# Hydra's flags: those that take a value, and the others.
VALUE_FLAGS = {*CONFIG_DIR_FLAGS, *("--cfg", "-c", "--package", "-p", "--info", "-i")}
# They replace conf/, or run the code of a pickle.
REFUSED_FLAGS = {"--config-path", "-cp", "--config-name", "-cn", "--experimental-rerun"}
PLAIN_FLAGS = {
    *("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r"),
    *("--multirun", "-m", "--shell-completion", "-sc"),
}


def order_command_words(words: Sequence[str]) -> list[str]:
    """The command line with Hydra's flags first, since argparse wants overrides in one piece.

    Each directory of options becomes a flag `--config-dir=PATH`, with an absolute path, which jobs
    and ranks get as it is. Raises UsageError for another word with dashes, such as --ckpt.
    """
    flags: list[str] = []
    overrides: list[str] = []
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag in REFUSED_FLAGS:
            raise UsageError(f"{flag} of Hydra is not used here: --config-dir=DIR adds options")
        if flag in VALUE_FLAGS and not equals:
            value = next(rest, "")
        if flag in CONFIG_DIR_FLAGS:
            flags.append(f"--config-dir={value and os.path.abspath(os.path.expanduser(value))}")
        elif flag in VALUE_FLAGS:
            flags += [word] if equals else [word, value]
        elif flag.lstrip("+") == "hydra.searchpath":
            flags += [f"--config-dir={place}" for place in _read_search_path(word)]
        elif flag in PLAIN_FLAGS:
            flags.append(word)
        elif word.startswith("-"):
            following = next(rest, "")
            typed = value or ("" if "=" in following or following.startswith("-") else following)
            key = flag.lstrip("-").replace("-", "_")
            meant = f"{key}={shlex.quote(typed) if typed else 'VALUE'}"
            raise UsageError(f"{flag} is no flag: settings are written without dashes, {meant}")
        else:
            overrides.append(word)
    return flags + overrides


def _read_search_path(word: str) -> list[str]:
    """The directories of `hydra.searchpath=[file://DIR,pkg://mypackage.conf]`."""
    try:
        value = OverridesParser.create().parse_override(word).value()
    except OverrideParseException:
        value = None
    places = [str(each).rpartition("://") for each in value] if isinstance(value, list) else []
    if not places or {scheme for scheme, _, _ in places} - {"", "file", "pkg"}:
        raise UsageError(
            f"{word}: it is a list of directories, as in "
            "'hydra.searchpath=[file://DIR,pkg://mypackage.conf]'"
        )
    return [
        str(find_package_directory(rest) or f"pkg://{rest}")
        if scheme == "pkg"
        else os.path.abspath(rest)
        for scheme, _, rest in places
    ]


def list_config_dir_flags() -> list[str]:
    """The words `--config-dir=PATH` of this command line."""
    return [word for word in sys.argv[1:] if word.startswith("--config-dir=")]


def list_config_directories() -> list[Path]:
    """All directories with options, in the order in which Hydra reads them."""
    typed = (Path(flag.partition("=")[2]) for flag in list_config_dir_flags())
    packages = (path for _, path in find_package_directories() if path is not None)
    return list(dict.fromkeys([Path(CONF_DIR), *typed, *packages]))


@cache
def find_package_directories() -> tuple[tuple[str, Path | None], ...]:
    """Each entry point of installed packages, with its directory; None where there is none."""
    points = sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name)
    return tuple((point.value, find_package_directory(point.value)) for point in points)


def find_package_directory(name: str) -> Path | None:
    """The directory of `mypackage.conf`; nothing of the package is imported."""
    top, *inner = name.split(".")
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        return None
    places = (Path(place, *inner) for place in (spec and spec.submodule_search_locations) or ())
    return next((place for place in places if place.is_dir()), None)


def check_config_directories() -> list[str]:
    """Warnings of options that nobody can choose; UsageError for a typed directory without any."""
    for flag in list_config_dir_flags():
        place = flag.partition("=")[2]
        if not os.path.isdir(place):
            raise UsageError(f"--config-dir: there is no directory '{place}'")
    warnings = [
        f"the installed package of '{name}' (entry point {ENTRY_POINT_GROUP}) has no such "
        "directory, so that its options are missing: install it again, or uninstall it"
        for name, path in find_package_directories()
        if path is None
    ]
    seen: dict[str, Path] = {}
    for directory in list_config_directories():
        for file in sorted(directory.glob("*/*.yaml")):
            name = file.relative_to(directory).with_suffix("").as_posix()
            if (first := seen.setdefault(name, file)) != file:
                group, _, option = name.partition("/")
                warnings.append(
                    f"{file} is not read: {group}={option} is {first}. Give it another name"
                )
    return warnings


def is_config_group(key: str) -> bool:
    """Whether a key of the command line chooses an option of a group."""
    group = key.lstrip("+~").partition("@")[0]
    return bool(group) and any((path / group).is_dir() for path in list_config_directories())


def list_group_options(group: str) -> dict[str, Path]:
    """The options of a group by name, sorted, each with its file."""
    files = [file for path in list_config_directories() for file in path.glob(f"{group}/*.yaml")]
    first = {file.stem: file for file in reversed(files)}
    return dict(sorted(first.items()))


def list_chosen_options(word: str) -> list[object]:
    """The values of `group=value`, of a sweep as well; of an empty list, None."""
    parser = OverridesParser.create()
    try:
        override = parser.parse_override(word)
        texts = override.sweep_string_iterator() if override.is_choice_sweep() else []
        values = [parser.parse_override(f"x={text}").value() for text in texts]
    except OverrideParseException:  # which Hydra raises as well
        return []
    if not override.is_sweep_override():
        values = [override.value()]
    lists = [each if isinstance(each, list) else [each] for each in values]
    return [each for chosen in lists for each in chosen or [None]]
