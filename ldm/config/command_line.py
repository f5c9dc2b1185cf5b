"""The frame of all verbs: free text that Hydra's grammar does not parse, checks, error messages."""

import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import NoReturn

import hydra
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from ldm.config.leftovers import remove_new_directories
from ldm.config.ranges import OWN_TARGET_PREFIXES, format_invalid_value
from ldm.config.rules import format_setting_value
from ldm.config.suggestions import (
    CONF_DIR,
    explain_hydra_error,
    format_unknown_setting,
    is_config_group,
)
from ldm.experiments.former_names import update_override
from ldm.experiments.run_dir import (
    HYDRA_RESOLVERS,
    get_launcher_layout,
    get_launcher_rank,
    parse_number,
)
from ldm.utils.errors import UsageError, program_name
from ldm.utils.files import check_path_length, read_text
from ldm.utils.locks import InUseError
from ldm.utils.text import escape_control_characters, replace_invalid_bytes

# Texts that people or networks read; every other one is a path, or may be.
FREE_TEXT_OPTIONS = ("prompt", "negative", "source", "text")
TextOptions = dict[str, str | None]  # paths and free texts by their keys, as typed
LAYOUT_CHARACTERS = "\n\t"
HELP_FLAGS = {"--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i"}

for _name, _resolver in HYDRA_RESOLVERS.items():
    OmegaConf.register_new_resolver(_name, _resolver, replace=True)


def update_former_settings() -> None:
    """Gives the settings of the command line their names of today; says so once for each."""
    for i, word in enumerate(sys.argv[1:], start=1):
        if (updated := update_override(word)) != word:
            sys.argv[i] = updated
            if get_launcher_rank() == 0:
                old, new = word.partition("=")[0], updated.partition("=")[0]
                print(f"note: the setting {old} is called {new} now", file=sys.stderr)


def pop_text_options(names: Iterable[str]) -> dict[str, str]:
    """Remove `name=value` of these names from the command line, and return the values as typed.

    Prompts and paths may hold any character, and Hydra's grammar would refuse many of them. In
    paths `~` is the home directory.
    """
    taken, names = {}, set(names)
    for argument in sys.argv[1:]:
        name, equals, value = argument.partition("=")
        if equals and name in names:
            taken[name] = (
                replace_invalid_bytes(value)
                if name in FREE_TEXT_OPTIONS
                else os.path.expanduser(value)
            )
    sys.argv[1:] = [a for a in sys.argv[1:] if a.partition("=")[0] not in taken]
    return taken


def quote_override(word: str) -> str:
    """`key=a/step=250.ckpt` with the quotes that Hydra's grammar wants around a second `=`.

    It also wants them around `~` and letters that are not ASCII.
    """
    key, _, value = word.partition("=")
    is_plain = re.fullmatch(r"[\w@/.+~-]+", key) and not re.search(r"[,'\"\[\]{}()$\\\t\n]", value)
    is_odd = not value.isascii() or re.search("[=~]", value)
    return f"{key}='{value}'" if is_plain and is_odd else word


def configure_output_encoding() -> None:
    """Lets standard output take paths of any bytes."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="surrogateescape")


def run_command(main: Callable[[], None], config_name: str, *, resumable: bool = False) -> None:
    """Calls a `hydra.main` function; prints a mistake of the user as one message, with a remedy.

    Exit code 2 for such a mistake, 130 for Ctrl-C; anything else keeps its full trace.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # exceptions come here, not to Hydra's printer
    # On busy cores, threads that spin for work make a step ten times slower; libgomp reads this.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    configure_output_encoding()
    if HELP_FLAGS & set(sys.argv):  # its reader may leave early, as `head` does
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    update_former_settings()
    # argparse, which Hydra uses, wants overrides in one piece: -m may stand anywhere.
    words = sorted(sys.argv[1:], key=lambda word: word not in ("-m", "--multirun"))
    sys.argv[1:] = map(quote_override, words)
    warnings.formatwarning = partial(_format_warning, standard=warnings.formatwarning)
    try:
        for word in words:
            check_group_option(*word.partition("=")[::2])
        main()
    except USAGE_ERRORS as error:
        exit_with_usage_error(error, config_name)
    except KeyboardInterrupt as error:
        how, code = error.args or ("interrupted", 130)
        more = "; the same command goes on from here" if resumable else ""
        print(f"\n{program_name()}: {how}{more}", file=sys.stderr)
        sys.exit(code)
    except (OSError, ValueError) as error:
        if "No trials are completed" in str(error):  # so optuna says that every job failed
            return
        why = error if isinstance(error, OSError) else error.__cause__  # logging wraps those
        if not isinstance(why, OSError) or _has_entered(main, error):
            raise
        place = why.filename or "the run directory"
        exit_with_usage_error(
            UsageError(f"nothing can be written to {place} ({why.strerror})"), config_name
        )


def command(
    name: str,
    *,
    texts: Sequence[str],
    read: Callable[[list[str]], Mapping[str, object]] = lambda words: {},
    resumable: bool = False,
) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Turns `run(cfg, options)` into the `main()` of a verb with the settings of conf/<name>.yaml.

    texts: the settings that are free text; `options` has their values. read: gets the words of the
    command line, may take some out of sys.argv, and returns more keyword arguments for `run`.
    resumable: the same command continues after an interruption.
    """

    def decorate(run: Callable[..., None]) -> Callable[[], None]:
        def main() -> None:
            words = sys.argv[1:]
            typed = pop_text_options(texts)
            more = read(words)

            @hydra.main(config_path=CONF_DIR, config_name=name, version_base="1.3")
            def composed(cfg: DictConfig) -> None:
                defaults = {key: cfg[key] for key in texts if not OmegaConf.is_missing(cfg, key)}
                with convert_to_usage_errors():
                    run(cfg, defaults | typed, **more)

            # torchrun ends its processes itself, also those that wait for another one.
            if resumable and get_launcher_layout() is None:
                signal.signal(signal.SIGTERM, _raise_keyboard_interrupt)
            run_command(composed, name, resumable=resumable)

        return main

    return decorate


def _raise_keyboard_interrupt(number: int, frame: object) -> None:
    """Ends the command as Ctrl-C does, with the exit code that a shell expects."""
    raise KeyboardInterrupt("stopped", 128 + number)


USAGE_ERRORS = (HydraException, OmegaConfBaseException, UsageError)


def exit_with_usage_error(error: Exception, config_name: str) -> NoReturn:
    """Tell a refusal, delete what this call has left in a new run directory, and exit with 2."""
    text = str(error) if isinstance(error, UsageError) else explain_hydra_error(error, config_name)
    print(
        f"\n{program_name()}: {escape_control_characters(text, keep=LAYOUT_CHARACTERS)}",
        file=sys.stderr,
    )
    remove_new_directories()
    sys.exit(2)


def check_group_option(group: str, value: str) -> None:
    """Refuse a number where a group's option is wanted, as in guidance=7; raises UsageError."""
    if is_config_group(group) and value and None not in map(parse_number, value.split(",")):
        options = ", ".join(sorted(path.stem for path in Path(CONF_DIR, group).glob("*.yaml")))
        key = {"guidance": "guidance.scale", "optimizer": "optimizer.lr"}.get(group)
        meant = f"{key}={value} sets the number, and " if key else ""
        raise UsageError(f"{group}={value} is no option of {group}: {meant}there are: {options}")


def _has_entered(main: Callable[[], None], error: BaseException) -> bool:
    """Whether Hydra, which makes the run directory, has come so far as to call our function."""
    code = getattr(main, "__wrapped__", main).__code__
    return any(frame.f_code is code for frame, _ in traceback.walk_tb(error.__traceback__))


def _format_warning(message, category, filename, lineno, line=None, *, standard) -> str:
    """A warning of ours as a sentence; others say where they come from."""
    if Path(filename).is_relative_to(Path(__file__).parent.parent):
        return f"warning: {message}\n"
    return standard(message, category, filename, lineno, line)


@contextmanager
def convert_to_usage_errors() -> Iterator[None]:
    """Prints errors while a run is put together without a trace, unless LDM_TRACE=1."""
    try:
        yield
    except InUseError as error:
        raise UsageError(str(error)) from error
    except (ValueError, TypeError, OSError, InstantiationException) as error:
        if isinstance(error, UsageError) or os.environ.get("LDM_TRACE"):
            raise
        while isinstance(error, InstantiationException) and error.__cause__ is not None:
            error = error.__cause__
        said = str(error)
        if isinstance(error, OSError) and said.startswith("[Errno"):  # the system's own words
            place = f"{error.filename}: " if error.filename is not None else ""
            said = f"{place}{error.strerror}"
        raise UsageError(f"{said} [{type(error).__name__}; LDM_TRACE=1 shows where]") from error


def require_option(options: Mapping[str, str | None], name: str) -> str:
    """A text that must have been given; UsageError where it was not."""
    if not options.get(name):
        raise UsageError(f"{name} is needed: give {name}=...")
    return options[name]


def read_prompts(options: Mapping[str, str | None]) -> list[str]:
    """The lines with text of the file `prompts`, else the one `prompt`, else none.

    Raises UsageError where the file has no such line.
    """
    if options["prompts"] is None:
        return [] if options["prompt"] is None else [options["prompt"]]
    try:
        lines = read_text(options["prompts"]).splitlines()
    except ValueError as error:
        raise UsageError(f"prompts={error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"prompts={options['prompts']} has no line with text")
    return prompts


def check_config(cfg: DictConfig, config_name: str, overrides: Iterable[str] | None = None) -> None:
    """Refuse, before anything heavy is imported, keys that nobody reads and values of a wrong type.

    overrides: the command line that `cfg` was composed of; None: this process's own.
    Raises UsageError. Keys added inside a node with a `_target_` are that call's own affair.
    """
    overrides = HydraConfig.get().overrides.task if overrides is None else overrides
    try:
        given = OmegaConf.to_container(cfg, resolve=True)
    except InterpolationKeyError as error:
        raise UsageError(f"{error.full_key}: {error.msg.splitlines()[0]}") from error
    _check_settings(given, compose_default_config(config_name, overrides), "", config_name)
    if config_name == "train":
        check_run_name(cfg.name)
    if cfg.get("direction") not in (None, "minimize", "maximize"):
        raise UsageError(f"direction={cfg.direction} is neither minimize nor maximize")


def compose_default_config(config_name: str, overrides: Iterable[str]) -> dict:
    """The settings of the options that these overrides choose, each with its default."""
    return _compose_default_config(
        config_name, tuple(o for o in overrides if is_config_group(o.partition("=")[0]))
    )


@cache
def _compose_default_config(config_name: str, groups: tuple[str, ...]) -> dict:
    return OmegaConf.to_container(compose(config_name, overrides=list(groups)))


def check_run_name(name: object) -> None:
    """Refuse names that are no place below runs/, or too long for one; raises UsageError."""
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
    given: dict, default: dict, prefix: str, config_name: str, ours: bool = True
) -> None:
    """UsageError for the first setting that nobody reads or whose value makes no sense."""
    target = given.get("_target_")
    ours = target.startswith(OWN_TARGET_PREFIXES) if isinstance(target, str) else ours
    for key, value in given.items():
        name, usual = f"{prefix}{key}", default.get(key, ...)
        if usual is ... and "_target_" not in default:
            raise UsageError(format_unknown_setting(name, config_name))
        if isinstance(usual, dict) and usual:
            if not isinstance(value, dict):
                inside = ", ".join(f"{name}.{key}" for key in usual if key != "_target_")
                raise UsageError(
                    f"{name}={format_setting_value(value)} is no single value, there are: {inside}"
                )
            _check_settings(value, usual, f"{name}.", config_name, ours)
        elif said := format_invalid_value(name, value, config_name, default=usual, ours=ours):
            raise UsageError(said)
