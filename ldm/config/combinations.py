"""Several values of a setting on a verb's command line: all combinations, each checked."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import product

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

from ldm.config.composition import list_task_words
from ldm.config.config_check import compose_config
from ldm.config.suggestions import check_group_option
from ldm.utils.errors import UsageError


def pop_sweep_choices() -> dict[str, list[str]]:
    """Removes `name=a,b,c` and --multirun from the command line; returns the values by name."""
    parser, choices, words = OverridesParser.create(), {}, []
    for word in sys.argv[1:]:
        words.append(word)
        with suppress(HydraException):  # of flags; Hydra itself explains what is wrong
            override = parser.parse_override(word)
            if override.is_discrete_sweep():
                values = dict.fromkeys(override.sweep_string_iterator())
                choices[override.get_key_element()] = list(values)
                words.pop()
    sys.argv[1:] = [word for word in words if word not in ("-m", "--multirun")]
    return choices


def compose_combinations(
    config_name: str, choices: Mapping[str, list[str]], *, may_vary: Sequence[str]
) -> list[tuple[dict[str, str], DictConfig]]:
    """Returns each combination of the choices with its configuration; call it inside hydra.main."""
    for name, values in choices.items():
        check_group_option(name, ",".join(values))
        if name.partition(".")[0] not in may_vary:
            raise UsageError(
                f"{name}={','.join(values)}: it takes one value here, and several are for "
                f"{', '.join(may_vary) or 'nothing'} (a list stands in brackets: '{name}=[a,b]')"
            )
    combinations = []
    for values in product(*choices.values()):
        varied = dict(zip(choices, values, strict=True))
        overrides = [f"{name}={value}" for name, value in varied.items()]
        overrides = [*list_task_words(), *overrides]
        combinations.append((varied, compose_config(config_name, overrides)))
    return combinations
