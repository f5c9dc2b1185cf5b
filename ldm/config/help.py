"""`ldm VERB --help`: the verb's text, its groups, its settings, with the comments of conf/."""

import re
from collections.abc import Iterable, Mapping
from itertools import takewhile
from pathlib import Path

from omegaconf import OmegaConf

from ldm.config.search_path import CONF_DIR, list_group_options


def format_help(verb: str, words: Iterable[str]) -> str:
    """Returns the help of a verb; `group=option` among the words shows this option's settings."""
    path = Path(CONF_DIR, f"{verb}.yaml")
    config = OmegaConf.load(path)
    typed = dict(word.split("=", 1) for word in words if "=" in word)
    parts = [config.hydra.help.template.rstrip()]
    if groups := list_verb_groups(config.defaults):
        parts += ["Groups (group=option, * is chosen) with their settings (group.key=value):"]
        for group, default in groups.items():
            chosen = typed[group].strip("[]").split(",") if group in typed else default
            parts.append(format_group(group, chosen))
    settings = re.search(r"\n\n(.*)\n\nhydra:", path.read_text(), re.DOTALL)[1]
    parts += ["Settings and their defaults (key=value):\n" + _indent(settings)]
    return "\n\n".join(parts)


def list_verb_groups(defaults: Iterable[str | Mapping[str, object]]) -> dict[str, object]:
    """Returns the groups of a defaults list, each with its default: an option, a list, or None."""
    pairs = [pair for entry in defaults if entry != "_self_" for pair in entry.items()]
    named = {key.removeprefix("override "): option for key, option in pairs}
    return {group: option for group, option in named.items() if not group.endswith("_logging")}


def format_group(group: str, chosen: object) -> str:
    """Returns a group's options with what each is for, and the settings of the chosen ones."""
    names = [chosen] if isinstance(chosen, str) else chosen or ()
    lines = [f"{group}:"]
    for path in list_group_options(group).values():
        purpose, settings = split_option(path.read_text())
        is_chosen = path.stem in names
        lines.append(f"{'*' if is_chosen else ' '} {path.stem:<20} {purpose}".rstrip())
        lines += [_indent(settings, 6)] if is_chosen and settings else []
    return "\n".join(lines)


def split_option(text: str) -> tuple[str, str]:
    """Returns the purpose of an option, its first comment, and the lines of its settings."""
    comments = [line[2:] for line in takewhile(lambda line: line[:1] == "#", text.splitlines())]
    purpose = " ".join(line for line in comments if not line.startswith("@package"))
    hidden = re.compile(r"^#.*\n|^defaults:.*\n(?:  .*\n)*|^ *_target_:.*\n", re.MULTILINE)
    return purpose, hidden.sub("", f"{text}\n").strip("\n")


def _indent(text: str, width: int = 2) -> str:
    return "\n".join(f"{' ' * width}{line}".rstrip() for line in text.splitlines())
