"""The frame of all verbs: free text that Hydra's grammar does not parse, checks, error messages."""

import atexit
import gc
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ldm.config.filter_quotes import quote_filter
from ldm.config.help import format_help
from ldm.config.own_components import list_replaced_settings, write_deletions
from ldm.config.search_path import CONF_DIR, check_config_directories, order_command_words
from ldm.config.suggestions import (
    check_group_option,
    check_setting_keys,
    explain_composition_error,
    explain_hydra_error,
)
from ldm.experiments.former_names import is_own_target, update_override
from ldm.experiments.new_directories import remove_new_directories
from ldm.experiments.run_dir import get_launcher_layout, get_launcher_rank
from ldm.utils.allocator import reuse_freed_memory
from ldm.utils.deferred_import import defer_torchmetrics
from ldm.utils.errors import UsageError, program_name
from ldm.utils.files import read_text
from ldm.utils.locks import InUseError
from ldm.utils.text import escape_control_characters, replace_invalid_bytes

# Texts that people or networks read; every other one is a path, or may be.
FREE_TEXT_OPTIONS = ("prompt", "negative", "source", "text")
TextOptions = dict[str, str | None]  # paths and free texts by their keys, as typed
LAYOUT_CHARACTERS = "\n\t"
HELP_FLAGS = {"--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i"}


def update_former_settings() -> None:
    """Gives the settings of the command line their names of today; says so once for each."""
    targets = dict(
        word.lstrip("+").split("._target_=", 1) for word in sys.argv if "._target_=" in word
    )
    own = tuple(f"{group}." for group, target in targets.items() if is_own_target(target))
    for i, word in enumerate(sys.argv[1:], start=1):
        updated = update_override(word)
        if updated != word and not (own and word.lstrip("+~").startswith(own)):
            sys.argv[i] = updated
            old, new = word.partition("=")[0], updated.partition("=")[0]
            print_note(f"the setting {old} is called {new} now")


def print_note(text: str) -> None:
    """Prints a note of the first process; standard output is for results."""
    if get_launcher_rank() == 0:
        print(f"note: {text}", file=sys.stderr)


def pop_text_options(names: Iterable[str]) -> dict[str, str]:
    """Removes `name=value` of these names from the command line; returns the values as typed."""
    options, sys.argv[1:] = split_text_options(sys.argv[1:], names)
    return options


def split_text_options(
    words: Sequence[str], names: Iterable[str]
) -> tuple[dict[str, str], list[str]]:
    """The values of `name=value` of these names, as typed, and the other words.

    Prompts and paths may hold any character; Hydra's grammar refuses many of them. In paths `~` is
    the home directory.
    """
    options, names = {}, set(names)
    for word in words:
        name, equals, value = word.partition("=")
        if equals and name in names:
            convert = replace_invalid_bytes if name in FREE_TEXT_OPTIONS else os.path.expanduser
            options[name] = convert(value)
    return options, [word for word in words if word.partition("=")[0] not in options]


def quote_override(word: str) -> str:
    """`key=a/step=250.ckpt` with the quotes that Hydra needs around `=`, `~` and non-ASCII.

    Also those of the entries of `key=[a/step=250.ckpt,b]`, and of conditions, see `quote_filter`.
    """
    if (quoted_filter := quote_filter(word)) is not None:
        return quoted_filter
    key, _, value = word.partition("=")
    is_list = value[:1] == "[" and value[-1:] == "]"
    entries = value[1:-1].split(",") if is_list else [value]
    is_plain = "=" in word and re.fullmatch(r"[\w@/.+~-]+", key) and not word.startswith("-")
    if not is_plain or any(re.search(r"[,'\"\[\]{}()$\\\t\n]", entry) for entry in entries):
        return word
    quoted = ",".join(
        f"'{entry.strip()}'" if re.search("[=~]", entry) or not entry.isascii() else entry
        for entry in entries
    )
    return f"{key}=[{quoted}]" if is_list else f"{key}={quoted}"


def configure_output_encoding() -> None:
    """Lets standard output take paths of any bytes."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="surrogateescape")


def prepare_command_line(config_name: str) -> None:
    """Gives settings their names of today, and moves Hydra's flags to the front."""
    update_former_settings()
    try:
        sys.argv[1:] = order_command_words(sys.argv[1:])
    except UsageError as error:
        exit_with_usage_error(error, config_name)


def run_command(main: Callable[[], None], config_name: str, *, resumable: bool = False) -> None:
    """Calls a `hydra.main` function; prints a mistake of the user as one message, with a remedy.

    Exit code 2 for such a mistake, 130 for Ctrl-C; anything else keeps its full trace.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come here, not to Hydra's printer
    # On busy cores, threads that spin for work make a step ten times slower; libgomp reads this.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Imports of torch and Lightning make no garbage, and collecting it takes a sixth of their time.
    gc.set_threshold(10_000, 20)
    atexit.register(_spare_imports_at_exit)
    reuse_freed_memory()
    defer_torchmetrics()
    configure_output_encoding()
    if HELP_FLAGS & set(sys.argv):  # its reader may leave early, as `head` does
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    warnings.formatwarning = partial(_format_warning, standard=warnings.formatwarning)
    try:
        words = sys.argv[1:]
        sys.argv[1:] = map(quote_override, words)
        for line in check_config_directories():
            print_note(line)
        if {"--help", "-h"} & set(words):
            print(format_help(config_name, words))
            return
        for word in words:
            check_group_option(*word.partition("=")[::2])
        sys.argv += delete_replaced_settings(words, config_name)
        check_setting_keys(words, config_name)
        main()
    except USAGE_ERRORS as error:
        exit_with_usage_error(error, config_name)
    except KeyboardInterrupt as error:
        how, code = error.args or ("interrupted", 130)
        more = "; the same command goes on from here" if resumable else ""
        print(f"\n{program_name()}: {how}{more}", file=sys.stderr)
        sys.exit(code)
    except (OSError, ValueError, YAMLError) as error:
        message = explain_composition_error(error, config_name, sys.argv[1:])
        if message and not _has_entered(main, error):
            exit_with_usage_error(UsageError(message), config_name)
        if "No trials are completed" in str(error):  # so optuna says that every job failed
            return
        why = error if isinstance(error, OSError) else error.__cause__  # logging wraps those
        if not isinstance(why, OSError) or _has_entered(main, error):
            raise
        place = why.filename or "the run directory"
        exit_with_usage_error(
            UsageError(f"nothing can be written to {place} ({why.strerror})"), config_name
        )


def delete_replaced_settings(words: Sequence[str], config_name: str) -> list[str]:
    """The words that delete what a class of the command line does not take; notes name it."""
    deletions = []
    for target, keys in list_replaced_settings(words, config_name).items():
        print_note(f"{target} takes no {', '.join(keys)}: left out")
        deletions += write_deletions(keys)
    return deletions


def command(
    name: str,
    *,
    texts: Sequence[str],
    read: Callable[[list[str]], Mapping[str, object]] = lambda words: {},
    resumable: bool = False,
    tidies: bool = False,
) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Turns `run(cfg, options)` into the `main()` of a verb with the settings of conf/<name>.yaml.

    texts: the settings that are free text; `options` has their values. read: gets the words of the
    command line, may take some out of sys.argv, and returns more keyword arguments for `run`.
    resumable: the same command continues after an interruption. tidies: it deletes its temporary
    files where it is stopped.
    """

    def decorate(run: Callable[..., None]) -> Callable[[], None]:
        def main() -> None:
            prepare_command_line(name)
            words = sys.argv[1:]
            typed = pop_text_options(texts)
            more = read(words)

            @hydra.main(config_path=CONF_DIR, config_name=name, version_base="1.3")
            def composed(cfg: DictConfig) -> None:
                defaults = {key: cfg[key] for key in texts if not OmegaConf.is_missing(cfg, key)}
                with convert_to_usage_errors():
                    run(cfg, defaults | typed, **more)

            # torchrun ends its processes itself, also those that wait for another one.
            if (resumable or tidies) and get_launcher_layout() is None:
                signal.signal(signal.SIGTERM, _raise_keyboard_interrupt)
            run_command(composed, name, resumable=resumable)

        return main

    return decorate


def _spare_imports_at_exit() -> None:
    """Collects garbage once, so that the interpreter does not walk through all modules as it ends.

    After an exception, whose frames hold the objects of the run, it ends in its own way.
    """
    if not hasattr(sys, "last_value"):
        gc.collect()
        gc.freeze()


def _raise_keyboard_interrupt(number: int, frame: object) -> None:
    """Ends the command as Ctrl-C does, with the exit code that a shell expects."""
    raise KeyboardInterrupt("stopped", 128 + number)


USAGE_ERRORS = (HydraException, OmegaConfBaseException, UsageError)


def exit_with_usage_error(error: Exception, config_name: str) -> NoReturn:
    """Prints a mistake, deletes the run directories that this call made, and exits with 2."""
    text = str(error) if isinstance(error, UsageError) else explain_hydra_error(error, config_name)
    print(
        f"\n{program_name()}: {escape_control_characters(text, keep=LAYOUT_CHARACTERS)}",
        file=sys.stderr,
    )
    remove_new_directories()
    sys.exit(2)


def _has_entered(main: Callable[[], None], error: BaseException) -> bool:
    """Whether Hydra, which makes the run directory, has called our function."""
    code = getattr(main, "__wrapped__", main).__code__
    return any(frame.f_code is code for frame, _ in traceback.walk_tb(error.__traceback__))


def _format_warning(message, category, filename, lineno, line=None, *, standard) -> str:
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
        if isinstance(error, UsageError):
            raise error from None
        message = str(error)
        if isinstance(error, OSError) and message.startswith("[Errno"):  # the system's own words
            place = f"{error.filename}: " if error.filename is not None else ""
            message = f"{place}{error.strerror}"
        elif "ModuleNotFoundError" in message:  # in Hydra's words, of a package of the user's
            message += " If it is yours, install it, or give PYTHONPATH=FOLDER, where it lies"
        raise UsageError(f"{message} [{type(error).__name__}; LDM_TRACE=1 shows where]") from error


def require_option(options: Mapping[str, str | None], name: str) -> str:
    """The value of a text option; UsageError without one."""
    if not options.get(name):
        raise UsageError(f"{name} is needed: give {name}=...")
    return options[name]


def read_prompts(options: Mapping[str, str | None]) -> list[str]:
    """The lines with text of the file `prompts`, else the one `prompt`, else none."""
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
